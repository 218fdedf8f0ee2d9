"""Generates the tables that compare buddy with its peers."""

from tools.tables.results import by_key, load_rows, rounds_note, section, spread, table


def peers_table() -> str:
    """Return the tokens/s of all peers with their spread."""
    rows = [row for row in load_rows("cpu_peers.jsonl") if "task" in row]
    found = by_key(rows, "metric", "variant", "task", "batch")
    lines = []
    for task, batch in dict.fromkeys((row["task"], row["batch"]) for row in rows):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            metrics = ("tokens_per_s", "ratio_to_stock", "ratio_to_own_dense", "accepted_per_step", "agreed_tokens")
            cells = [spread(found.get((metric, variant, task, batch))) for metric in metrics]
            about = found["tokens_per_s", variant, task, batch]
            what = [variant, about["framework"], str(about["layers"]), "yes" if about["lossless"] else "no"]
            lines.append([task, str(batch), *what, *cells])
    heads = ["task", "batch", "", "framework", "layers", "lossless", "tokens/s", "over stock vLLM"]
    heads += ["over its own plain loop", "accepted a step", "tokens as in the plain loop"]
    return section(rounds_note(rows), heads, lines)


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
