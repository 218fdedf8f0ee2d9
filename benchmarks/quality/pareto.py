"""Draws quality against speed, from results files alone.

    python -m benchmarks.quality.pareto            # docs/pareto.png, at batch 8

Quality comes from `vllm-buddy eval`, speed from benchmarks.speed.decode; pareto_points.py pairs them. Bars are p20 to
p80 of the speed and one standard error of the quality. All policies are scored on the same text and questions, so their
differences are known more precisely than the bars suggest.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.result_rows import RESULTS_DIR, read_rows
from benchmarks.harness.rounds import Refused
from benchmarks.quality.pareto_points import ACCURACY, PERPLEXITY, STATIC, Point, front, points
from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation.policy import DENSE
from vllm_buddy.evaluation.results import load_results

QUALITY = ("quality_shipped.json", "quality_recipes.json", "quality_static.json")
SPEED = "cpu_decode.jsonl"
OUT = Path(__file__).parents[2] / "docs" / "pareto.png"

# Point.family -> title in the legend, and line style.
_FAMILIES = {
    STATIC: ("static, no repair; stock vLLM", {"linestyle": ":", "fillstyle": "none"}),
    "bypass": ("bypass; routed engine", {"linestyle": "-"}),
    "lora": ("LoRA; routed engine", {"linestyle": "--"}),
    "none": ("no repair; routed engine", {"linestyle": "-.", "fillstyle": "none"}),
}
_COLOURS = (
    *("#d62728", "#ff9896", "#e377c2", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd"),
    *("#8c564b", "#17becf", "#bcbd22", "#7f7f7f", "#393b79", "#c49c94"),
)
_MARKERS = "os^Dv<>Pp*hXd"
_CUT = 20.0  # larger perplexities are written above the panel: drawn to scale they would compress all others
_LINE = 9  # points between two of these lines


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.pareto",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--quality", type=Path, nargs="+", default=[RESULTS_DIR / name for name in QUALITY])
    parser.add_argument("--speed", type=Path, default=RESULTS_DIR / SPEED)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    try:
        files, rows = [load_results(path) for path in args.quality], read_rows(args.speed)
    except (EvaluationError, OSError) as error:
        raise Refused(str(error)) from None
    panels = {metric: points(files, rows, args.batch, metric) for metric in (PERPLEXITY, ACCURACY)}
    draw(panels, args.batch, args.out)
    print(f"wrote {args.out}")


def draw(panels: dict[str, list[Point]], batch: int, out: Path) -> None:
    """Draw perplexity and accuracy side by side, and below a legend with a block for each family of policies."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise Refused("a plot needs matplotlib; pip install matplotlib") from None
    looks = _looks(point for found in panels.values() for point in found)
    legend_inches = 0.19 * (2 + max(_legend_rows(looks, family) for family in _FAMILIES))
    canvas = Canvas(figsize=(10, 5.4 + legend_inches), layout="constrained")
    grid = canvas.add_gridspec(2, 2, height_ratios=[5.4, legend_inches])
    for column, (metric, found) in enumerate(panels.items()):
        axis = canvas.add_subplot(grid[0, column])
        _draw_panel(axis, found, looks, lower_is_better=metric == PERPLEXITY)
        axis.set_xlabel(f"decode tokens/s over stock vLLM's, batch {batch}")
        axis.grid(True, alpha=0.3)
    left, right = canvas.axes
    left.set_ylabel(f"perplexity over the unrouted model's; beyond {_CUT:g} written above")
    left.set_yscale("log")
    left.set_ylim(0.85, _CUT)
    left.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    left.minorticks_off()
    _write_what_is_cut(left, panels[PERPLEXITY], looks)
    right.set_ylabel("PIQA accuracy; chance is 0.5")
    below = canvas.add_subplot(grid[1, :])
    below.set_axis_off()
    _draw_legend(below, left, looks)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise Refused(f"cannot write the picture {out}: {error}") from None


def _looks(found: Iterable[Point]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the style of each family and policy.

    The layer set is the part of a policy's name after the last plus. It has one colour, with and without a repair.
    """
    keys = dict.fromkeys((point.family, point.policy) for point in found if point.family != DENSE)
    sets = list(dict.fromkeys(policy.rpartition("+")[2] for _, policy in keys))
    looks = {}
    for family, policy in keys:
        index = sets.index(policy.rpartition("+")[2])
        look = {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
        looks[family, policy] = {**look, **_FAMILIES[family][1]}
    return looks


def _draw_panel(
    axis: Any, found: Sequence[Point], looks: dict[tuple[str, str], dict[str, Any]], *, lower_is_better: bool
) -> None:
    best = front(found, lower_is_better=lower_is_better)
    axis.plot(
        [point.speed[1] for point in best],
        [point.quality for point in best],
        color="black",
        alpha=0.15,
        linewidth=7,
        solid_joinstyle="round",
        label="nothing is faster and better",
        zorder=1,
    )
    dense = {
        "color": "black",
        "marker": "*",
        "markersize": 11,
        "linestyle": "",
        "label": "unrouted, stock vLLM",
        "zorder": 100,
    }
    _errorbar(axis, [point for point in found if point.family == DENSE], dense)
    for index, ((family, policy), look) in enumerate(looks.items()):
        own = [point for point in found if (point.family, point.policy) == (family, policy)]
        if own:
            _errorbar(axis, own, {"markersize": 5, "linewidth": 1.2, "label": policy, "zorder": 99 - index, **look})


def _write_what_is_cut(axis: Any, found: Sequence[Point], looks: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Write the name and perplexity of each point beyond the cut above the panel at its speed, the worst on top."""
    from matplotlib.ticker import EngFormatter

    short = EngFormatter(places=0, sep="")
    lines: Counter[float] = Counter()
    for point in sorted(found, key=lambda point: point.quality):
        if point.quality <= _CUT:
            continue
        axis.annotate(
            f"{point.policy} {short(point.quality)}",
            (point.speed[1], 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4 + _LINE * lines[point.speed[1]]),
            textcoords="offset points",
            horizontalalignment="center",
            fontsize=7,
            color=looks[point.family, point.policy]["color"],
        )
        lines[point.speed[1]] += 1


def _errorbar(axis: Any, found: Sequence[Point], look: dict[str, Any]) -> None:
    found = sorted(found, key=lambda point: point.speed[1])
    middle, quality = [point.speed[1] for point in found], [point.quality for point in found]
    axis.errorbar(
        middle,
        quality,
        xerr=[[p.speed[1] - p.speed[0] for p in found], [p.speed[2] - p.speed[1] for p in found]],
        yerr=[point.stderr for point in found],
        fmt="none",
        ecolor=look["color"],
        elinewidth=0.7,
        alpha=0.35,
        zorder=2,
    )
    axis.plot(middle, quality, **look)


def _legend_rows(looks: dict[tuple[str, str], dict[str, Any]], family: str) -> int:
    num_policies = sum(own == family for own, _ in looks)
    return -(-num_policies // _legend_columns(num_policies))


def _legend_columns(num_labels: int) -> int:
    return 2 if num_labels > 4 else 1


def _draw_legend(below: Any, panel: Any, looks: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Draw a block for each family, from left to right, with the handles of `panel`."""
    from matplotlib.legend import Legend

    handles = dict(zip(*reversed(panel.get_legend_handles_labels())))
    blocks = [("", [label for label in handles if label not in {policy for _, policy in looks}])]
    for family, (title, _) in _FAMILIES.items():
        policies = [policy for own, policy in looks if own == family]
        if policies:
            blocks.append((title, policies))
    columns = [_legend_columns(len(labels)) for _, labels in blocks]
    # Widths in characters. A handle takes about nine.
    widths = [max(2 + len(title), n * (8 + max(map(len, labels)))) for n, (title, labels) in zip(columns, blocks)]
    for index, (title, labels) in enumerate(blocks):
        legend = Legend(
            below,
            [handles[label] for label in labels],
            labels,
            title=title,
            loc="upper left",
            bbox_to_anchor=(sum(widths[:index]) / sum(widths), 1),
            ncols=columns[index],
            fontsize=8,
            title_fontsize=8,
            alignment="left",
            frameon=False,
            borderaxespad=0,
            columnspacing=1,
        )
        below.add_artist(legend)


if __name__ == "__main__":
    main()
