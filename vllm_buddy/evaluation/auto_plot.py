"""Draws the picture of `vllm-buddy eval-budget` from its results."""

from pathlib import Path
from typing import Any

from vllm_buddy.evaluation.auto_figures import MIXED, AutoEvaluation
from vllm_buddy.evaluation.plot import check_plotting, save_canvas

COLUMNS = 3


def plot_auto(found: AutoEvaluation, out: Path) -> None:
    """Draw loss against layers for each data set, and the depths that each gets at the artifact's price.

    Raises:
        EvaluationError: matplotlib is not installed, or the file cannot be written.
    """
    check_plotting()
    from matplotlib.figure import Figure as Canvas

    names = sorted(found.data_sets, key=lambda name: name != MIXED)  # all data sets together first
    rows = -(-(len(names) + 1) // COLUMNS)
    canvas = Canvas(figsize=(4 * COLUMNS, 3.3 * rows), layout="constrained")
    axes = list(canvas.subplots(rows, COLUMNS, squeeze=False).flat)
    for name, axis in zip(names, axes):
        _curves(found, name, axis)
    axes[0].legend(frameon=False)
    _distribution(found, [name for name in names if name != MIXED], axes[len(names)])
    for unused in axes[len(names) + 1 :]:
        unused.set_axis_off()
    save_canvas(canvas, out)


def _curves(found: AutoEvaluation, name: str, axis: Any) -> None:
    for series, style, label in (
        ("constant", "o-", "constant budget"),
        ("auto", "-", "auto, over prices"),
        ("best", "--", "best choice in hindsight"),
    ):
        points = sorted({(row["layers"], row["loss"]) for row in found.of(series, name)})
        axis.plot(*zip(*points), style, label=label, markersize=4)
    samples = found.of("constant", name)[0]["samples"]
    axis.set(title=f"{name} ({samples} samples)", xlabel="mean layers", ylabel="nats per token")
    axis.grid(alpha=0.3)


def _distribution(found: AutoEvaluation, names: list[str], axis: Any) -> None:
    depths = sorted({row["layers"] for row in found.of("constant", names[0])})
    bottom = [0.0] * len(depths)
    for name in names:
        counts = found.at_own_price(name)["depths"]
        heights = [counts.get(str(depth), 0) for depth in depths]
        axis.bar([str(depth) for depth in depths], heights, bottom=bottom, label=name)
        bottom = [low + high for low, high in zip(bottom, heights)]
    axis.set(title=f"depths at price {found.at_own_price(names[0])['price']:g}", xlabel="layers", ylabel="samples")
    axis.set_ylim(top=1.6 * max(bottom))  # room for the legend
    axis.legend(frameon=False, fontsize="small", loc="upper left")
