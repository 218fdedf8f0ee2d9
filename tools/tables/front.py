"""Generates the figures of README.md: its four claims, and one short table of speed and one of quality."""

from collections.abc import Iterable

from tools.tables.auto import overload_figures
from tools.tables.quality import margin_kept, over_dense
from tools.tables.results import Row, by_key, load_rows, section, where

BUDGETS = (0.75, 0.5)
_VARIANTS = ("buddy 1.0", "buddy 0.75", "buddy 0.5", "pruned 0.75", "pruned 0.5")
_PROMPT_TOKENS = 1500
_MANY_PATHS = "buddy 0.5, 8 paths"  # one for each request of a batch of 8
# Decode or output tokens/s over stock vLLM's: each file that has buddy at full depth, without drafts.
_FULL_DEPTH_FILES = (
    "cpu_decode.jsonl",
    "cpu_decode_qwen.jsonl",
    "cpu_quantised.jsonl",
    "cpu_speculation.jsonl",
    "cpu_speculation_qwen.jsonl",
    "cpu_serving.jsonl",
    "cpu_peers.jsonl",
)
_KINDS = (("quality_token.json", "buddy:token", "per token"), ("quality_shipped.json", "buddy", "per request"))


def claims() -> str:
    """Return what a user may expect: each claim with its figure, its condition and where to read on."""
    decode = by_key(load_rows("cpu_decode.jsonl"), "metric", "variant", "batch")
    batches = sorted({batch for metric, _, batch in decode if metric == "ratio_to_stock"})

    def times(variant: str) -> str:
        return _range(decode["ratio_to_stock", variant, batch]["p50"] for batch in batches)

    token_speed = {budget: _range(token_decode(budget)) for budget in BUDGETS}
    shipped, token = load_rows("quality_shipped.json"), load_rows("quality_token.json")
    layers = _layers(shipped)
    qwen = load_rows("quality_qwen.json")
    solved = {row["budget"]: row["accuracy"] for row in load_rows("quality_qwen_gsm8k.jsonl")}
    left = [f"{accuracy:.0%}" for accuracy in sorted(solved[budget] for budget in solved if budget < 1)]
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
            f"{_range(full_depth())} times its tokens/s, by model, batch and run; on GPTQ weights "
            f"{_range(full_depth('GPTQ'))}.",
            "- **Skipping costs quality.** SmolLM2-135M, one depth per request, as in these figures of speed: "
            f"{_perplexities(shipped, 'buddy')} times the full model's perplexity on {_list(map(str, layers))} of 30 "
            "layers, on a fifth of WikiText-2's validation split that training left out, and "
            f"{_margins(shipped, 'buddy')} of PIQA's margin over chance; on a module of Python that training left out, "
            f"{_perplexities(load_rows('quality_code.json'), 'buddy')} times. On half of the layers most "
            f"[answers](docs/answers.md) loop. With depths per token it is {_perplexities(token, 'buddy:token')} times "
            f"and {_margins(token, 'buddy:token')}, and decoding reaches {token_speed[0.75]} times stock vLLM's "
            f"tokens/s at 0.75 and {token_speed[0.5]} at 0.5. Qwen2.5-Coder-0.5B: {_perplexities(qwen, 'buddy')} "
            f"times at {_list(map(str, _layers(qwen)))} of 24 layers, "
            f"but it solves {solved[1.0]:.0%} of GSM8K on all layers and "
            f"{' to '.join(dict.fromkeys((left[0], left[-1])))} at these depths. Measure your own task. "
            "[Figures](docs/quality.md)",
            _overload_claim(),
        ]
    )


def _overload_claim() -> str:
    """Return the claim of the newest run of the step of load."""
    full, follows = overload_figures()
    return (
        "- **Shallower instead of slower.** At 1.5 times the load that stock vLLM sustains, budget `auto` with a price "
        f"that follows the load keeps p99 between tokens at {follows.itl_ms:.0f} ms and to the first token at "
        f"{follows.ttft_ms / 1e3:.1f} s, where full depth takes {full.itl_ms:.0f} ms and {full.ttft_ms / 1e3:.1f} s. "
        f"The requests then run {follows.budget:.0%} of the layers. [Figures](docs/benchmarks.md#overload)"
    )


def full_depth(weights: str = "as it is") -> list[float]:
    """Return tokens/s at budget 1.0 over stock vLLM's on the same weights, of all files that have it, as medians."""
    rows = [row for name in _FULL_DEPTH_FILES for row in load_rows(name)]
    return [
        row["p50"]
        for row in rows
        if row.get("weights", "as it is") == weights
        and row.get("metric") in ("ratio_to_stock", "over_same_weights" if "weights" in row else "over_stock")
        and row["variant"] in ("buddy 1.0", "buddy 1.0, own paths")
    ]


def token_decode(budget: float) -> list[float]:
    """Return decode tokens/s with depths per token over stock vLLM's, of all prompts and batches, as medians."""
    rows = by_key(load_rows("cpu_schedules.jsonl"), "metric", "variant", "prompt_tokens", "batch")
    wanted = ("decode_over_stock", f"buddy {budget:g}, token")
    return [row["p50"] for key, row in rows.items() if key[:2] == wanted]


def speed_at_a_glance() -> str:
    """Return seven rows: decoding by batch, on several paths, the first token, and all requests at once."""
    decode_rows, serving_rows = load_rows("cpu_decode.jsonl"), load_rows("cpu_serving.jsonl")
    decode = by_key(decode_rows, "metric", "variant", "batch")
    prefill_rows, step_rows = load_rows("cpu_prefill.jsonl"), load_rows("cpu_profile.jsonl")
    prefill = by_key(prefill_rows, "metric", "variant", "prompt_tokens")
    serving = by_key(serving_rows, "metric", "workload", "rate", "variant")
    lines = [
        [f"decode, batch {batch}", *_cells(decode["ratio_to_stock", variant, batch] for variant in _VARIANTS)]
        for batch in (1, 8, 32)
    ]
    own = (decode["ratio_to_stock", f"buddy {budget:g}, own paths", 8] for budget in BUDGETS)
    lines.append(["decode, batch 8, paths picked by the router", "", *_cells(own), "", ""])
    steps = by_key(step_rows, "metric", "batch", "variant")
    many = steps["step_ms", 8, "stock"]["p50"] / steps["step_ms", 8, _MANY_PATHS]["p50"]
    lines.append(["decode, batch 8, 8 different random paths", "", "", f"{many:.2f}", "", ""])
    first = (prefill["over_stock", variant, _PROMPT_TOKENS] for variant in _VARIANTS)
    lines.append([f"time to first token, prompt of {_PROMPT_TOKENS:,} (less is better)", *_cells(first)])
    at_once = (serving["ratio_to_stock", "unique", "inf", variant] for variant in _VARIANTS)
    lines.append(["HTTP server, all requests at once", *_cells(at_once)])
    note = (
        "Tokens/s over stock vLLM (more is better), in the row of the first token time over stock vLLM's; *pruned* is "
        "stock vLLM on a checkpoint with as many layers, without repair. Medians; `python -m benchmarks.speed.decode` "
        f"({where(decode_rows[0])}), `benchmarks.speed.prefill` (commit {prefill_rows[0]['commit']}), "
        f"`benchmarks.speed.profile_step` (random paths, commit {step_rows[0]['commit']}), "
        f"`benchmarks.speed.serving` (commit {serving_rows[0]['commit']}). [Spreads, and all else](docs/benchmarks.md)."
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
        f"{dense['dense', 'piqa_acc']['value']:.3f}: {dense['dense', 'perplexity']['n']:,} tokens of the last "
        "fifth of WikiText-2's validation split (the rest is among what was trained on), "
        f"{dense['dense', 'piqa_acc']['n']} questions of PIQA (standard error "
        f"{dense['dense', 'piqa_acc']['stderr']:.3f}; in brackets the share of the margin over chance). "
        "[Commands, baselines, and what does not work](docs/quality.md)."
    )
    heads = ["depth", "mean layers of 30", "perplexity over dense", "KL", "same top token", "PIQA"]
    return section(note, heads, lines)


def _cells(rows: Iterable[dict[str, float]]) -> list[str]:
    return [f"{row['p50']:.2f}" for row in rows]


def _layers(rows: list[Row], policy: str = "buddy") -> list[int]:
    return sorted({row["layers"] for row in rows if row["policy"] == policy and row["budget"] < 1}, reverse=True)


def _perplexities(rows: list[Row], policy: str) -> str:
    return _list(f"{over_dense(rows, policy, depth):.2f}" for depth in _layers(rows, policy))


def _margins(rows: list[Row], policy: str) -> str:
    return _list(f"{margin_kept(rows, policy, depth):.0%}" for depth in _layers(rows, policy))


def _range(values: Iterable[float]) -> str:
    least, *_, most = sorted(values)
    return f"{least:.2f} to {most:.2f}"


def _list(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}"
