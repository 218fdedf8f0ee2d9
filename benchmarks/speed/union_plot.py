"""Draws the results of benchmarks.speed.union: decode tokens/s when the requests of a batch run different paths.

    python -m benchmarks.speed.union_plot benchmarks/results/cpu_union.jsonl docs/union.png

It reads nothing but the results file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.plotting import draw_from_file, new_canvas

Row = dict[str, Any]

_COLOURS = {True: "C0", False: "C1"}  # by bypass
_ASIDE = {True: -0.15, False: 0.15}  # horizontal offset of points that would otherwise overlap
_MARKERS = {"random": "o", "pool": "s"}


def plot_union(rows: Sequence[Row], out: Path) -> None:
    """Draw tokens/s over the size of the union, and of random paths over their number, both between their bounds.

    Raises:
        SystemExit: `rows` have no figures of a union, or matplotlib is not installed.
    """
    measured = [row for row in rows if row["metric"] == "tokens_per_s" and "union_layers" in row]
    if not measured:
        raise SystemExit("these rows have no tokens_per_s by union_layers, so there is nothing to draw")
    canvas = new_canvas(9.6, 4.4)
    by_union, by_number = canvas.subplots(1, 2, sharey=True)
    for bypass in sorted({row["bypass"] for row in measured}, reverse=True):
        _draw_by_union(by_union, [row for row in measured if row["bypass"] == bypass], bypass)
        _draw_by_number(by_number, [row for row in rows if row.get("series") == "random" and row["bypass"] == bypass])
    about = measured[0]
    layers = min(row["layers"] for row in measured)
    by_union.set_title(f"{layers} layers a token, batch of {about['batch']}", fontsize=10)
    by_union.set_xlabel("layers of the union of all paths in the batch")
    by_union.set_ylabel("decode tokens/s")
    by_number.set_title("the random ones, by number of paths", fontsize=10)
    by_number.set_xlabel("distinct paths in the batch")
    by_number.set_xscale("log", base=2)
    counts = sorted({row["distinct_paths"] for row in measured if row["series"] == "random"})
    by_number.set_xticks(counts, [str(count) for count in counts])
    for axis in (by_union, by_number):
        axis.grid(True, alpha=0.3)
        axis.set_ylim(bottom=0)
    handles, labels = by_union.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(out, dpi=150)


def _draw_by_union(axis: Any, rows: Sequence[Row], bypass: bool) -> None:
    repair = "with bypass" if bypass else "without bypass"
    bounds = sorted((row for row in rows if row["series"] == "one path"), key=lambda row: row["layers"])
    colour = _COLOURS[bypass]
    if bounds:
        best = bounds[0]["p50"]
        axis.axhline(best, color=colour, linestyle=":", label=f"{repair}: all rows on one path of that depth")
        x, y = [row["layers"] for row in bounds], [row["p50"] for row in bounds]
        axis.plot(x, y, color=colour, linestyle="--", label=f"{repair}: all rows on one path of the union's layers")
    for series, marker in _MARKERS.items():
        points = [row for row in rows if row["series"] == series]
        label = f"{repair}: random paths" if series == "random" else f"{repair}: a path each, from a pool of layers"
        x = [row["union_layers"] + _ASIDE[bypass] for row in points]
        _bars(axis, x, points, color=colour, marker=marker, label=label)


def _draw_by_number(axis: Any, rows: Sequence[Row]) -> None:
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row["distinct_paths"])
    colour = _COLOURS[rows[0]["bypass"]]
    for bound, style in ("one path", ":"), ("union", "--"):
        found = [row for row in rows if row["metric"] == "bound_tokens_per_s" and row["bound"] == bound]
        axis.plot([r["distinct_paths"] for r in found], [r["p50"] for r in found], color=colour, linestyle=style)
    measured = [row for row in rows if row["metric"] == "tokens_per_s"]
    x = [row["distinct_paths"] * 1.2 ** _ASIDE[row["bypass"]] for row in measured]
    _bars(axis, x, measured, color=colour, marker=_MARKERS["random"])


def _bars(axis: Any, x: Sequence[float], rows: Sequence[Row], **look: Any) -> None:
    """Draw medians with bars from p20 to p80."""
    bars = [[row["p50"] - row["p20"] for row in rows], [row["p80"] - row["p50"] for row in rows]]
    axis.errorbar(x, [row["p50"] for row in rows], yerr=bars, linestyle="", markersize=5, capsize=2, **look)


def main() -> None:
    draw_from_file("benchmarks.speed.union_plot", __doc__, plot_union)


if __name__ == "__main__":
    main()
