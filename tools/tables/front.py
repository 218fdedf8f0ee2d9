"""Generates the figures of README.md: its four claims, and one short table of speed and one of quality."""

from collections.abc import Iterable

from tools.tables.auto import overload_figures
from tools.tables.quality import margin_kept, over_dense
from tools.tables.results import by_key, load_rows, section, where

BUDGETS = (0.75, 0.5)
_VARIANTS = ("buddy 1.0", "buddy 0.75", "buddy 0.5", "pruned 0.75", "pruned 0.5")
_PROMPT_TOKENS = 1500
_KINDS = (("quality_token.json", "buddy:token", "per token"), ("quality_shipped.json", "buddy", "per request"))


def claims() -> str:
    """Return what a user may expect: each claim with its figure, its condition and where to read on."""
    decode = by_key(load_rows("cpu_decode.jsonl"), "metric", "variant", "batch")
    batches = sorted({batch for metric, _, batch in decode if metric == "ratio_to_stock"})

    def times(variant: str) -> str:
        return _range(decode["ratio_to_stock", variant, batch]["p50"] for batch in batches)

    load = overload_figures()
    token = load_rows("quality_token.json")
    layers = sorted({row["layers"] for row in token if row["policy"] == "buddy:token"}, reverse=True)
    perplexity = [over_dense(token, "buddy:token", depth) for depth in layers]
    margin = [margin_kept(token, "buddy:token", depth) for depth in layers]
    qwen = load_rows("quality_qwen.json")
    qwen_layers = sorted({row["layers"] for row in qwen if row["budget"] < 1}, reverse=True)
    qwen_perplexity = [over_dense(qwen, "buddy", depth) for depth in qwen_layers]
    on = f"{batches[0]} to {batches[-1]}"
    return "\n".join(
        [
            f"- **Faster.** Decoding reaches {times('buddy 0.75')} times the tokens/s of stock vLLM at budget 0.75 and "
            f"{times('buddy 0.5')} times at 0.5: SmolLM2-135M on two CPU cores, batch {on}, one path per batch. A "
            "checkpoint that is pruned to the same depth, the limit, reaches "
            f"{times('pruned 0.75')} and {times('pruned 0.5')}. [Figures](docs/benchmarks.md#decode)",
            "- **Full depth is untouched.** A request at budget 1.0 gets stock vLLM's tokens and, in fp32, "
            "bit-identical logprobs, alone and beside routed requests "
            f"([test](tests/serving/end_to_end/test_full_depth.py), [conditions](docs/serving.md#full-depth)), at "
            f"{times('buddy 1.0')} times its speed.",
            "- **What skipping costs is measured.** With depths per token, WikiText-2 perplexity is "
            f"{_list(f'{x:.2f}' for x in perplexity)} times the full model's at a mean of "
            f"{_list(map(str, layers))} of 30 layers, and {_list(f'{x:.0%}' for x in margin)} of PIQA's margin over "
            f"chance are left: SmolLM2-135M's artifact, trained on two CPU cores. For Qwen2.5-Coder-0.5B it is "
            f"{_list(f'{x:.2f}' for x in qwen_perplexity)} times at {_list(map(str, qwen_layers))} of 24 layers, one "
            "depth per request. [Figures](docs/quality.md)",
            "- **Shallower instead of slower.** At 1.5 times the load that stock vLLM sustains, budget `auto` with a "
            f"price that follows the load keeps p99 inter-token latency at {load['price follows load']:.2f} times that "
            f"of an unloaded server, at a mean budget of {load['mean budget']:.2f}; without the price it is "
            f"{load['price 0']:.2f} times. [Figures](docs/benchmarks.md#overload)",
        ]
    )


def speed_at_a_glance() -> str:
    """Return six rows: decoding by batch, on own paths, the first token, and a server with all requests at once."""
    decode_rows, serving_rows = load_rows("cpu_decode.jsonl"), load_rows("cpu_serving.jsonl")
    decode = by_key(decode_rows, "metric", "variant", "batch")
    prefill = by_key(load_rows("cpu_prefill.jsonl"), "metric", "variant", "prompt_tokens")
    serving = by_key(serving_rows, "metric", "workload", "rate", "variant")
    lines = [
        [f"decode, batch {batch}", *_cells(decode["ratio_to_stock", variant, batch] for variant in _VARIANTS)]
        for batch in (1, 8, 32)
    ]
    own = (decode["ratio_to_stock", f"buddy {budget:g}, own paths", 8] for budget in BUDGETS)
    lines.append(["decode, batch 8, each request on a path of its own", "", *_cells(own), "", ""])
    first = (prefill["over_stock", variant, _PROMPT_TOKENS] for variant in _VARIANTS)
    lines.append([f"time to first token, prompt of {_PROMPT_TOKENS:,} (less is better)", *_cells(first)])
    at_once = (serving["ratio_to_stock", "unique", "inf", variant] for variant in _VARIANTS)
    lines.append(["HTTP server, all requests at once", *_cells(at_once)])
    note = (
        "Tokens/s over stock vLLM (more is better), in the fifth row time over stock vLLM's; *pruned* is stock vLLM on "
        "a checkpoint with as many layers, without repair. Medians; `python -m benchmarks.speed.decode` and "
        f"`benchmarks.speed.prefill` ({where(decode_rows[0])}), `benchmarks.speed.serving` (commit "
        f"{serving_rows[0]['commit']}). [Spreads, and all else](docs/benchmarks.md)."
    )
    return section(note, ["SmolLM2-135M, bf16", *_VARIANTS], lines)


def quality_at_a_glance() -> str:
    """Return three depths of both shipped artifacts."""
    lines = []
    for file, policy, kind in _KINDS:
        rows = load_rows(file)
        found = by_key(rows, "policy", "layers", "metric")
        for layers in sorted({row["layers"] for row in rows if row["policy"] == policy}, reverse=True):
            cells = [f"{over_dense(rows, policy, layers):.2f}", f"{found[policy, layers, 'kl']['value']:.3f}"]
            cells.append(f"{found[policy, layers, 'agreement']['value']:.1%}")
            accuracy = found[policy, layers, "piqa_acc"]["value"]
            lines.append([kind, str(layers), *cells, f"{accuracy:.3f} ({margin_kept(rows, policy, layers):.0%})"])
    dense = by_key(rows, "policy", "metric")
    note = (
        f"Against the full model, whose perplexity is {dense['dense', 'perplexity']['value']:.2f} and accuracy "
        f"{dense['dense', 'piqa_acc']['value']:.3f}: {dense['dense', 'perplexity']['n']:,} tokens of WikiText-2, "
        f"{dense['dense', 'piqa_acc']['n']} questions of PIQA (standard error "
        f"{dense['dense', 'piqa_acc']['stderr']:.3f}; in brackets the share of the margin over chance). "
        "[Commands, baselines, and what does not work](docs/quality.md)."
    )
    heads = ["depth", "mean layers of 30", "perplexity over dense", "KL", "same top token", "PIQA"]
    return section(note, heads, lines)


def _cells(rows: Iterable[dict[str, float]]) -> list[str]:
    return [f"{row['p50']:.2f}" for row in rows]


def _range(values: Iterable[float]) -> str:
    least, *_, most = sorted(values)
    return f"{least:.2f} to {most:.2f}"


def _list(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}"
