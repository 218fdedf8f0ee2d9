"""Generates the tables that compare buddy with its peers."""

from tools.tables.results import by_key, load_rows, rounds_note, section, spread, table


def peers_summary() -> str:
    """Return the medians of tokens/s over stock vLLM, by task and batch."""
    rows = [row for row in load_rows("cpu_peers.jsonl") if row["metric"] == "ratio_to_stock"]
    found = by_key(rows, "variant", "task", "batch")
    settings = list(dict.fromkeys((row["task"], row["batch"]) for row in rows))
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [found[variant, *setting] for setting in settings]
        what = [variant, own[0]["framework"], str(own[0]["layers"]), "yes" if own[0]["lossless"] else "no"]
        lines.append([*what, *(f"{row['p50']:.2f}" for row in own)])
    heads = ["", "framework", "layers", "lossless", *(f"{task}, batch {batch}" for task, batch in settings)]
    note = (
        "`python -m benchmarks.peers.compare`: decode tokens/s over stock vLLM on the same prompts, greedy. "
        f"{rounds_note(rows)} The spread, and what each can and cannot do, is in "
        "[docs/benchmarks.md](docs/benchmarks.md#peers)."
    )
    return section(note, heads, lines)


def peers_table() -> str:
    """Return the tokens/s of all peers with their spread."""
    rows = [row for row in load_rows("cpu_peers.jsonl") if "task" in row]
    found = by_key(rows, "metric", "variant", "task", "batch")
    lines = []
    for task, batch in dict.fromkeys((row["task"], row["batch"]) for row in rows):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            metrics = ("tokens_per_s", "ratio_to_stock", "ratio_to_own_dense", "accepted_per_step", "agreed_tokens")
            cells = [spread(found.get((metric, variant, task, batch))) for metric in metrics]
            lines.append([task, str(batch), variant, *cells])
    heads = ["task", "batch", "", "tokens/s", "over stock vLLM", "over its own plain loop", "accepted a step"]
    return section(rounds_note(rows), [*heads, "tokens as in the plain loop"], lines)


def capabilities_table() -> str:
    """Return what each system can do, and how that is known."""
    rows = load_rows("cpu_peers.jsonl")
    can = [row for row in rows if row["metric"] == "can"]
    found = by_key(can, "capability", "variant")
    systems = list(dict.fromkeys(row["variant"] for row in can))
    lines = []
    for capability in dict.fromkeys(row["capability"] for row in can):
        cells = [found[capability, system] for system in systems]
        lines.append([capability, *(f"{cell['value']} ({cell['how']}: {cell['where']})" for cell in cells)])
    cannot = [[row["variant"], row["reason"]] for row in rows if row["metric"] == "cannot"]
    return "\n".join([*table(["", *systems], lines), "", *table(["not timed", "why"], cannot)])
