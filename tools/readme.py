"""Writes the generated parts of README.md and of the shipped artifact's card: the settings table from the schema, the
figures from the results files.

python tools/readme.py            # rewrite
python tools/readme.py --check    # exit 1 if a page is not up to date
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

ROOT = FilePath(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CARD = ROOT / "vllm_buddy" / "artifacts" / "smollm2-135m" / "README.md"


def main() -> int:
    stale = False
    for path, names in PAGES.items():
        old = path.read_text()
        new = generate(old, names, path.name)
        stale |= old != new
        if "--check" not in sys.argv[1:]:
            path.write_text(new)
    return int(stale and "--check" in sys.argv[1:])


def generate(text: str, names: Sequence[str], page: str) -> str:
    """`text` with the parts between the markers made anew."""
    for name in names:
        pattern = re.compile(rf"(<!-- begin {name} .*?-->\n).*?(<!-- end {name} -->)", re.DOTALL)
        body = SECTIONS[name]()
        text, found = pattern.subn(lambda m, body=body: m[1] + body + m[2], text)  # type: ignore[misc]
        if found != 1:
            raise SystemExit(f"{page} has {found} parts named {name}")
    return text


def settings_table() -> str:
    """One row per server setting."""
    from vllm_buddy.serving.settings import BuddySettings

    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in BuddySettings.model_fields.items():
        default = "" if field.default is None else f"`{json.dumps(field.default)}`"
        rows.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def decode_table() -> str:
    """Decode speed: p50 with p20 to p80."""
    rows = _rows("cpu_decode.jsonl")
    by_key = {(r["metric"], r["variant"], r["batch"]): r for r in rows}
    batches = sorted({r["batch"] for r in rows})
    variants = list(dict.fromkeys(r["variant"] for r in rows))

    def cell(metric: str, variant: str, batch: int, form: Callable[[float], str]) -> str:
        row = by_key.get((metric, variant, batch))
        return "" if row is None else f"{form(row['p50'])} ({form(row['p20'])} to {form(row['p80'])})"

    first = rows[0]
    lines = [
        f"`python benchmarks/decode.py`: decode steps of SmolLM2-135M in bf16, {_where(first)}. In each of "
        f"{first['n']} rounds all variants ran one after the other in one process; ratios are of tokens/s within a "
        "round, medians with 20th to 80th percentile. *pruned* is stock vLLM on a checkpoint that has only the layers "
        "of buddy's path, without a repair; buddy runs the shipped artifact's bypass on the layers it skips, on one "
        "path for all requests or, as *own paths*, on those its Decision Module picks. At 1.0 it is compared with "
        "stock. Routing is the share of router, plan and cache views in "
        "the time of all steps, with the Decision Module asked every 16 tokens, or before every token "
        "(R=1).",
        "",
        "| batch | variant | layers | ms per step | over stock | over pruned | routing |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch in batches:
        for variant in variants:
            layers = by_key["ms_per_step", variant, batch]["layers"]
            cells = [
                cell("ms_per_step", variant, batch, "{:.2f}".format),
                cell("ratio_to_stock", variant, batch, "{:.2f}".format),
                cell("ratio_to_pruned", variant, batch, "{:.2f}".format),
                cell("routing_share", variant, batch, "{:.1%}".format),
            ]
            lines.append(f"| {batch} | {variant} | {layers} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def memory_table() -> str:
    """KV capacity and resident memory."""
    rows = _rows("cpu_memory.jsonl")
    value = {(r["metric"], r["variant"]): r["value"] for r in rows}
    lines = [f"| {_where(rows[0])} | stock | buddy | ratio |", "|---|---|---|---|"]
    for metric, name in (("kv_capacity_tokens", "KV capacity, tokens"), ("resident_mib", "resident memory, MiB")):
        ratio = value[f"{metric}_ratio", "buddy"]
        lines.append(f"| {name} | {value[metric, 'stock']:,.0f} | {value[metric, 'buddy']:,.0f} | {ratio:.3f} |")
    return "\n".join(lines) + "\n"


def quality_table() -> str:
    """The shipped artifact against the unrouted model."""
    return _quality(json.loads((RESULTS / "quality_shipped.json").read_text()))


def recipes_table() -> str:
    """Every way to choose and repair a path, at one training cost."""
    return _quality(json.loads((RESULTS / "quality_recipes.json").read_text()))


def _quality(rows: list[dict[str, Any]]) -> str:
    """A line per policy and depth: perplexity over dense, accuracy, and what is kept of dense's margin over chance."""
    found = {(r["policy"], r["layers"], r["metric"]): r for r in rows}
    dense = {metric: row for (policy, _, metric), row in found.items() if policy == "dense"}
    chance = 0.5
    lines = [
        "| layers | policy | perplexity | over dense | KL | agreement | PIQA acc | margin kept | acc_norm | paths |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((r["layers"], r["policy"]) for r in rows if r["policy"] == "dense" or r["budget"] < 1)
    for layers, policy in sorted(keys, key=lambda key: -key[0]):

        def value(metric: str, layers: int = layers, policy: str = policy) -> float | None:
            row = found.get((policy, layers, metric))
            return None if row is None else row["value"]

        def shown(number: float | None, form: str) -> str:
            return "" if number is None else format(number, form)

        perplexity, accuracy = value("perplexity"), value("piqa_acc")
        over = None if perplexity is None else perplexity / dense["perplexity"]["value"]
        kept = None if accuracy is None else (accuracy - chance) / (dense["piqa_acc"]["value"] - chance)
        cells = [
            shown(perplexity, ",.2f"),
            shown(over, ",.3f"),
            shown(value("kl"), ".3f"),
            shown(value("agreement"), ".3f"),
            shown(accuracy, ".3f"),
            shown(kept, ".0%"),
            shown(value("piqa_acc_norm"), ".3f"),
            shown(value("distinct_paths"), ".0f"),
        ]
        lines.append(f"| {layers} | {policy} | {' | '.join(cells)} |")
    tokens, questions = dense["perplexity"]["n"], dense["piqa_acc"]["n"]
    lines += [
        "",
        f"{tokens:,} scored tokens of the last fifth of WikiText-2's validation split, {questions} questions of PIQA. "
        f"Standard error of a PIQA accuracy: {dense['piqa_acc']['stderr']:.3f}; rows share text and questions, so "
        "differences between rows are known better than the rows themselves.",
    ]
    return "\n".join(lines) + "\n"


def _rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / name
    if not path.is_file():
        raise SystemExit(f"{path.relative_to(ROOT)} is missing; run the benchmark that writes it")
    return [json.loads(line) for line in path.read_text().splitlines()]


def _where(row: dict[str, Any]) -> str:
    return f"{row['hardware']}, commit {row['commit']}, {row['date']}"


SECTIONS: dict[str, Callable[[], str]] = {
    "settings": settings_table,
    "decode": decode_table,
    "memory": memory_table,
    "quality": quality_table,
    "recipes": recipes_table,
}
PAGES = {ROOT / "README.md": list(SECTIONS), CARD: ["quality"]}

if __name__ == "__main__":
    sys.exit(main())
