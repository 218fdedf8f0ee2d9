"""Generates the tables of where the time of a step goes, and of the union effect."""

from tools.tables.results import by_key, load_rows, percent, rounds_note, section, spread, table


def profile_table() -> str:
    """Return the parts of a decode step in ms, as medians over rounds."""
    rows = load_rows("cpu_profile.jsonl")
    found = by_key([{"part": None, **row} for row in rows], "batch", "variant", "metric", "part")
    parts = list(dict.fromkeys(row["part"] for row in rows if "part" in row))
    blocks = [rounds_note(rows) + " *of step* is the share of the last column."]
    for batch in sorted({row["batch"] for row in rows}):
        names = list(dict.fromkeys(row["variant"] for row in rows if row["batch"] == batch))
        last = names[-1]
        lines = []
        for part in parts:
            cells = [f"{found[batch, name, 'part_ms', part]['p50']:.3f}" for name in names]
            lines.append([part, *cells, percent(found[batch, last, "part_share", part]["p50"])])
        lines.append(["**step, without wrappers**", *(_p50(found[batch, n, "step_ms", None]) for n in names), ""])
        lines.append(["wrappers, ratio", *(_p50(found[batch, n, "instrumented_ratio", None]) for n in names), ""])
        blocks += ["", *table([f"batch {batch}, ms", *names, "of step"], lines)]
    return "\n".join(blocks)


def union_table() -> str:
    """Return what it costs when requests of a batch run different paths."""
    rows = load_rows("cpu_union.jsonl")
    found = by_key([{"bound": None, **row} for row in rows], "variant", "metric", "bound")
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        row = found[variant, "tokens_per_s", None]
        lines.append(
            [
                row["series"],
                "yes" if row["bypass"] else "no",
                str(row["layers"]),
                str(row["distinct_paths"]),
                str(row["union_layers"]),
                spread(row),
                spread(found.get((variant, "ratio_to_one_path", None))),
                spread(found.get((variant, "ratio_to_union", None))),
            ]
        )
    heads = ["paths", "bypass", "layers", "distinct", "union", "tokens/s", "over one path", "over a path of the union"]
    return section(f"Batch {rows[0]['batch']}. {rounds_note(rows)}", heads, lines)


def _p50(row: dict[str, float]) -> str:
    return f"{row['p50']:.3f}"
