"""Tables of speculation and lossless mode."""

import json
from typing import Any

from tools.tables.results import RESULTS, by_key, load_rows, section, spread, table, where


def speculation_table() -> str:
    """Return all variants at all batch sizes with p20 to p80, and the drafts that a step accepts, for each task."""
    return _speculation("cpu_speculation.jsonl", "python -m benchmarks.speed.speculation")


def second_model_speculation_table() -> str:
    """Return the same for Qwen2.5-Coder-0.5B."""
    return _speculation("cpu_speculation_qwen.jsonl", "benchmarks.speed.speculation")


def _speculation(name: str, command: str) -> str:
    rows = load_rows(name)
    found = by_key(rows, "metric", "variant", "task", "batch")
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    parts = [
        f"`{command}`: decode tokens/s over stock vLLM without drafts, greedy, and over stock vLLM with n-grams; "
        f"drafts that a step of a request accepts. Medians of {rows[0]['n']} rounds with 20th to 80th percentile, "
        f"{where(rows[0])}."
    ]
    names = {"over_stock": "over stock", "over_ngram": "over n-gram"}
    for task in dict.fromkeys(row["task"] for row in rows):
        lines = []
        for variant in dict.fromkeys(row["variant"] for row in rows):
            by_metric = {metric: [spread(found[metric, variant, task, batch]) for batch in batches] for metric in names}
            if "n-gram" not in variant:
                by_metric["over_ngram"] = [""] * len(batches)
            cells = [cell for of_metric in by_metric.values() for cell in of_metric]
            accepted = [f"{found['accepted_per_step', variant, task, batch]['p50']:.2f}" for batch in batches]
            lines.append([variant, *cells, " / ".join(accepted)])
        heads = [f"{name}, batch {batch}" for name in names.values() for batch in batches]
        parts += [f"**{task}**", "\n".join(table(["variant", *heads, "accepted"], lines))]
    return "\n\n".join(parts)


def profile_depths_table() -> str:
    """Return how often drafts are right by depth and length of the chain, and the earliest agreeing depth."""
    profile = json.loads((RESULTS / "depth_profile.json").read_text())
    about, depths = profile["about"], profile["depths"]
    lengths = range(len(depths[0]["right"]))
    lines = [
        [str(row["depth"]), f"{row['cost']:.2f}", *(f"{r:.3f}" for r in row["right"]), f"{row['ead']:.3f}"]
        for row in depths
    ]
    note = (
        f"Artifact `{about['artifact']}`, {about['positions']:,} positions of greedy answers to passages of "
        f"{about['text']}. *cost*: weights that a pass reads, over those of the whole model. *right*: the share of "
        "chains of that many drafts that are all right. *EAD*: the share of tokens with that earliest agreeing depth."
    )
    return section(note, ["layers", "cost", *(f"{n + 1} right" for n in lengths), "EAD"], lines)


def profile_exits_table() -> str:
    """Return what an exit's training, its adapter and a smaller vocabulary change of the drafts that are right."""
    exits = json.loads((RESULTS / "depth_profile.json").read_text())["exits"]
    lengths = range(len(exits[0]["right"]))
    what = {
        "right": "exit, as it drafts",
        "all_tokens": "exit, among all tokens",
        "untrained": "its path with the bypass of each layer, among all tokens",
        "library": "first path of the library, among all tokens",
    }
    lines = [
        [str(row["depth"]), name, *(f"{share:.3f}" for share in row[key])]
        for row in exits
        for key, name in what.items()
        if row[key] is not None
    ]
    note = "The artifact's exits, on the same positions."
    return section(note, ["layers", "drafts of", *(f"{n + 1} right" for n in lengths)], lines)


def profile_speedups_table() -> str:
    """Return the best predicted speed-up of each source of drafts, and what DEX would gain."""
    profile = json.loads((RESULTS / "depth_profile.json").read_text())
    dex = [
        f"{row['devices']} devices {row['exploration_speedup']:.2f} and {row['exit_speedup']:.2f}"
        for row in profile["dex"]
    ]
    note = (
        "Predicted speed-up of the best depth and number of drafts, over no drafts, where a row of drafts costs "
        f"{profile['about']['row_cost']} of a step of one row. On several devices, as an upper "
        f"bound, depth exploration and the best single exit: {'; '.join(dex)}."
    )
    return _speedups(note, profile)


def profile_shape_table() -> str:
    """Return the predicted speed-ups where passes cost what they would in a model of another shape."""
    profile = json.loads((RESULTS / "depth_profile_llama8b.json").read_text())
    note = (
        "**A prediction, not a measurement**: the same drafts, where passes cost the weights that they would read in a "
        f"model of the shape of Llama-3.1-8B, and a row {profile['about']['row_cost']} of a step of one row."
    )
    return _speedups(note, profile)


def _speedups(note: str, profile: dict[str, Any]) -> str:
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in profile["speedups"]:
        key = (row["source"], row["batch"])
        if key not in best or row["speedup"] > best[key]["speedup"]:
            best[key] = row
    sources = list(dict.fromkeys(source for source, _ in best))
    batches = list(dict.fromkeys(batch for _, batch in best))
    lines = []
    for source in sources:
        cells: list[str] = []
        for batch in batches:
            row = best[source, batch]
            of = "" if row["depth"] is None else f" ({row['drafts']} of {row['depth']} layers)"
            cells.append(f"{row['speedup']:.2f}{of}")
        lines.append([source, *cells])
    return section(note, ["drafts from", *(f"batch {batch}" for batch in batches)], lines)
