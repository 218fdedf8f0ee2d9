"""Generates the tables of speed and memory."""

from collections.abc import Sequence
from typing import Any

from tools.tables.results import by_key, load_rows, number, percent, rounds_note, section, spread, table, where


def decode_table() -> str:
    """Return the decode speed with p20 to p80."""
    rows = load_rows("cpu_decode.jsonl")
    found = by_key(rows, "metric", "variant", "batch")
    lines = []
    for batch in sorted({row["batch"] for row in rows}):
        for variant in _variants(rows):
            layers = found["ms_per_step", variant, batch]["layers"]
            cells = [spread(found.get((metric, variant, batch))) for metric in ("ms_per_step", *_RATIOS)]
            routing = spread(found.get(("routing_share", variant, batch)), percent)
            lines.append([str(batch), variant, str(layers), *cells, routing])
    heads = ["batch", "variant", "layers", "ms per step", "over stock", "over pruned", "routing"]
    return section(rounds_note(rows), heads, lines)


def prefill_table() -> str:
    """Return the time to the first token."""
    rows = load_rows("cpu_prefill.jsonl")
    found = by_key(rows, "metric", "variant", "prompt_tokens")
    lines = [
        [
            f"{length:,}",
            variant,
            str(found["ttft_ms", variant, length]["layers"]),
            *(spread(found.get((metric, variant, length))) for metric in ("ttft_ms", "over_stock", "over_pruned")),
        ]
        for length in sorted({row["prompt_tokens"] for row in rows})
        for variant in _variants(rows)
    ]
    note = (
        f"`python -m benchmarks.speed.prefill`: time to first token of one request, over that of stock vLLM and of the "
        f"pruned checkpoint (below 1 is sooner). {rounds_note(rows)}"
    )
    return section(note, ["prompt tokens", "variant", "layers", "ms", "over stock", "over pruned"], lines)


def second_model_table() -> str:
    """Return decode and prefill of Qwen2.5-Coder-0.5B over stock vLLM's."""
    decode, prefill = load_rows("cpu_decode_qwen.jsonl"), load_rows("cpu_prefill_qwen.jsonl")
    steps, firsts = by_key(decode, "metric", "variant", "batch"), by_key(prefill, "metric", "variant", "prompt_tokens")
    batches, lengths = sorted({row["batch"] for row in decode}), sorted({row["prompt_tokens"] for row in prefill})
    lines = []
    for variant in _variants(prefill):
        if variant == "stock":
            continue
        cells = [spread(steps["ratio_to_stock", variant, batch]) for batch in batches]
        cells += [spread(firsts["over_stock", variant, length]) for length in lengths]
        lines.append([variant, str(steps["ratio_to_stock", variant, batches[0]]["layers"]), *cells])
    note = (
        "`benchmarks.speed.decode` and `benchmarks.speed.prefill`: decode tokens/s (more is better) and time to first "
        f"token (less is better), over stock vLLM's. Decode: {rounds_note(decode)} First token: {rounds_note(prefill)}"
    )
    heads = [*(f"decode, batch {batch}" for batch in batches), *(f"first token of {length:,}" for length in lengths)]
    return section(note, ["variant", "layers", *heads], lines)


def quantised_table() -> str:
    """Return decode speed of depth and quantised weights together, over stock vLLM's on both kinds of weights."""
    rows = load_rows("cpu_quantised.jsonl")
    found = by_key(rows, "metric", "weights", "variant", "batch")
    batches = sorted({row["batch"] for row in rows})
    lines = []
    for weights in dict.fromkeys(row["weights"] for row in rows):
        for variant in _variants(rows):
            cells = [
                spread(found[metric, weights, variant, batch])
                for batch in batches
                for metric in ("ms_per_step", "over_stock", "over_same_weights")
            ]
            lines.append([weights, variant, str(found["ms_per_step", weights, variant, batches[0]]["layers"]), *cells])
    note = (
        "`python -m benchmarks.speed.quantised`: ms of a decode step, and tokens/s over those of stock vLLM on the "
        f"model as it is, and on the same weights. {rounds_note(rows)}"
    )
    heads = [f"{head}, batch {batch}" for batch in batches for head in ("ms", "over stock", "over same weights")]
    return section(note, ["weights", "variant", "layers", *heads], lines)


def schedules_table() -> str:
    """Return both schedules beside stock vLLM with p20 to p80."""
    rows = load_rows("cpu_schedules.jsonl")
    found = by_key(rows, "metric", "variant", "prompt_tokens", "batch")
    lines = []
    for length, batch in dict.fromkeys((row["prompt_tokens"], row["batch"]) for row in rows):
        for variant in _variants(rows):
            about = found["ttft_ms", variant, length, batch]
            cells = [spread(found[metric, variant, length, batch]) for metric in ("ttft_ms", *_FIRST_AND_NEXT)]
            lines.append([f"{length:,}", str(batch), variant, str(about["layers"]), *cells, str(about["n"])])
    note = (
        "`python -m benchmarks.speed.schedules`: mean time to first token in ms and over that of stock vLLM, and "
        "tokens/s of steps in which all requests decode over stock vLLM's. *layers*: of every token, or the mean that "
        f"no request exceeds. Medians with 20th to 80th percentile of so many *rounds*, {where(rows[0])}."
    )
    heads = ["prompt", "batch", "variant", "layers", "first token", "over stock", "tokens/s over stock", "rounds"]
    return section(note, heads, lines)


def mixed_table() -> str:
    """Return the figures of budgets mixed in one batch."""
    rows = load_rows("cpu_mixed.jsonl")
    found = by_key(rows, "metric", "variant")
    meaning = {
        "ms_per_step": "ms per step",
        "tokens_per_s": "tokens/s",
        "predicted_ms": "ms per step as predicted from runs with one budget",
        "of_predicted": "tokens/s over predicted",
        "over_turns": "tokens/s over three batches that take turns",
        "over_all_full": "tokens/s over all requests at 1.0",
    }
    lines = [[text, spread(found[metric, "mixed"])] for metric, text in meaning.items()]
    for (metric, variant), row in found.items():
        if metric == "steps_per_token":
            first = found["first_token_step", variant]
            budget = variant.removeprefix("mixed: ")
            text = f"budget {budget}: step of the first token; steps from token to token"
            lines.append([text, f"{first['p50']:.0f}; {row['p50']:.2f} ({row['p20']:.2f} to {row['p80']:.2f})"])
    note = (
        f"`python -m benchmarks.speed.mixed`: {rows[0]['batch']} requests in one batch, a third each at 1.0, 0.75 "
        f"and 0.5. {rounds_note(rows)}"
    )
    return section(note, ["decode", "median (p20 to p80)"], lines)


def serving_table() -> str:
    """Return all figures of the serving benchmark with their spread."""
    rows = load_rows("cpu_serving.jsonl")
    columns = {
        "output_tokens_per_s": "tokens/s",
        "ratio_to_stock": "over stock",
        "p50_ttft_ms": "TTFT p50",
        "p99_ttft_ms": "TTFT p99",
        "p50_tpot_ms": "TPOT p50",
        "p99_tpot_ms": "TPOT p99",
        "p50_itl_ms": "ITL p50",
        "p99_itl_ms": "ITL p99",
        "goodput_per_s": "goodput/s",
    }
    found = by_key(rows, "metric", "workload", "rate", "variant")
    lines = [
        [workload, str(rate), variant, *(spread(found.get((metric, workload, rate, variant))) for metric in columns)]
        for workload, rate in dict.fromkeys((row["workload"], row["rate"]) for row in rows)
        for variant in _variants([row for row in rows if (row["workload"], row["rate"]) == (workload, rate)])
    ]
    note = (
        f"`python -m benchmarks.speed.serving`: `vllm bench serve` against servers on one machine. {rounds_note(rows)} "
        f"Latencies in ms, goodput in requests/s within `{rows[0]['objective']}` (ms). Rate: requests/s, `inf`: all at "
        "once."
    )
    return section(note, ["prompts", "rate", "variant", *columns.values()], lines)


def memory_table() -> str:
    """Return KV capacity and resident memory."""
    rows = load_rows("cpu_memory.jsonl")
    value = {(row["metric"], row["variant"]): row["value"] for row in rows}
    lines = []
    names = {
        "kv_capacity_tokens": "KV capacity, tokens",
        "resident_mib": "resident memory with a KV cache of 1 GiB, MiB",
    }
    for metric, name in names.items():
        ratio = value[f"{metric}_ratio", "buddy"]
        lines.append([name, f"{value[metric, 'stock']:,.0f}", f"{value[metric, 'buddy']:,.0f}", f"{ratio:.3f}"])
    return "\n".join(table([where(rows[0]), "stock", "buddy", "ratio"], lines))


def max_budget_table() -> str:
    """Return what servers with `max_budget` hold."""
    rows = load_rows("cpu_max_budget.jsonl")
    value = {(row["metric"], row["max_budget"]): row["value"] for row in rows}
    lines = []
    for max_budget, layers in {row["max_budget"]: row["layers"] for row in rows}.items():
        tokens = value["kv_tokens", max_budget]
        lines.append(
            [
                f"{max_budget:g}",
                str(layers),
                f"{value['weights_mib', max_budget]:.0f}",
                f"{value['kv_tokens_per_gib', max_budget]:,}",
                f"{tokens:,}",
                f"{tokens / value['kv_tokens', 1.0]:.2f}",
            ]
        )
    columns = ["layers loaded", "weights, MiB", "KV tokens in 1 GiB", "KV tokens beside the weights in 1 GiB", "ratio"]
    return "\n".join(table(["`max_budget`", *columns], lines))


def start_table() -> str:
    """Return the time from a server's command line to its first answer, beside stock vLLM."""
    rows = load_rows("cpu_start.jsonl")
    found = by_key(rows, "metric", "cache", "variant")
    lines = [
        [
            {"cold": "empty (cold)", "warm": "of an earlier start (warm)"}[cache],
            spread(found["start_s", cache, "stock"]),
            spread(found["start_s", cache, "buddy"]),
            spread(found["start_over_stock", cache, "buddy"]),
        ]
        for cache in ("cold", "warm")
    ]
    return section(rounds_note(rows), ["caches of compiled code", "stock, s", "buddy, s", "ratio"], lines)


def layer_calls_table() -> str:
    """Return what direct calls of generated code gain in a step, and what sharing it between layers gains at start."""
    rows = load_rows("cpu_layer_calls.jsonl")
    alone, shared = (
        row["value"] for name in ("each layer alone", "shared code") for row in rows if row["variant"] == name
    )
    steps = [row for row in rows if row["metric"] == "ms_per_step"]
    gains = {
        row["batch"]: row for row in rows if row["metric"] == "speed_over_wrappers" if row["variant"] == "direct calls"
    }
    found = by_key(steps, "variant", "batch")
    lines = [
        [str(batch), spread(found["torch's wrappers", batch]), spread(found["direct calls", batch]), spread(gain)]
        for batch, gain in gains.items()
    ]
    note = (
        f"{rounds_note(steps)} All layers are made in {number(shared)} s where those that are alike share code, and "
        f"in {number(alone)} s where each is compiled alone (once each, the compiler's caches on disk are warm)."
    )
    return section(note, ["batch", "torch's wrappers, ms/step", "direct calls, ms/step", "speed-up"], lines)


_FIRST_AND_NEXT = ("over_stock", "decode_over_stock")
_RATIOS = ("ratio_to_stock", "ratio_to_pruned")


def _variants(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["variant"] for row in rows))


def replicas_table() -> str:
    """Return two replicas with budget affinity over the same without, by traffic."""
    rows = load_rows("cpu_replicas.jsonl")
    found = by_key(rows, "traffic", "variant", "metric")
    note = (
        f"`python -m benchmarks.speed.replicas`: {rows[0]['replicas']} replicas of one core each, {rows[0]['users']} "
        f"users, output tokens/s. {rounds_note(rows)}"
    )
    heads = ["users ask for", "by load alone", "affinity", "gain", "gain at 1.0", "gain at 0.5", "predicted gain"]
    lines = [
        [
            "half 1.0, half 0.5" if traffic == "mixed" else f"all {traffic}",
            spread(found[traffic, "by load alone", "tokens_per_s"]),
            *(
                spread(found.get((traffic, "affinity", metric)))
                for metric in ("tokens_per_s", "gain", "gain at 1.0", "gain at 0.5", "predicted_gain")
            ),
        ]
        for traffic in dict.fromkeys(row["traffic"] for row in rows)
    ]
    return section(note, heads, lines)
