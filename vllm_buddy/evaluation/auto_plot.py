"""The picture of `vllm-buddy eval-budget`, from its results alone."""

from pathlib import Path as FilePath
from typing import Any

from vllm_buddy.evaluation.auto_budget import AutoEvaluation
from vllm_buddy.evaluation.plot import check_plotting

COLUMNS = 3


def plot_auto(found: AutoEvaluation, out: FilePath) -> None:
    """Loss against layers for each data set, and which depths each gets at the artifact's price.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    check_plotting()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted(found.num_samples, key=lambda name: name != "mixed")  # the whole first
    rows = -(-(len(names) + 1) // COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(4 * COLUMNS, 3.3 * rows), layout="constrained", squeeze=False)
    axes = list(grid.flat)
    for name, axis in zip(names, axes):
        _curves(found, name, axis)
    axes[0].legend(frameon=False)
    _distribution(found, [name for name in names if name != "mixed"] or names, axes[len(names)])
    for unused in axes[len(names) + 1 :]:
        unused.set_axis_off()
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _curves(found: AutoEvaluation, name: str, axis: Any) -> None:
    for rows, style, label in (
        (found.constants, "o-", "constant budget"),
        (found.auto, "-", "auto, over prices"),
        (found.oracle, "--", "best choice in hindsight"),
    ):
        points = sorted({(row["layers"], row["loss"]) for row in rows if row["data_set"] == name})
        axis.plot(*zip(*points), style, label=label, markersize=4)
    axis.set(title=f"{name} ({found.num_samples[name]} samples)", xlabel="mean layers", ylabel="nats per token")
    axis.grid(alpha=0.3)


def _distribution(found: AutoEvaluation, names: list[str], axis: Any) -> None:
    depths = sorted({row["layers"] for row in found.constants})
    bottom = [0.0] * len(depths)
    for name in names:
        counts = found.at_artifact_price(name)["depths"]
        heights = [counts.get(str(depth), 0) for depth in depths]
        axis.bar([str(depth) for depth in depths], heights, bottom=bottom, label=name)
        bottom = [low + high for low, high in zip(bottom, heights)]
    axis.set(title=f"depths at price {found.artifact_price:g}", xlabel="layers", ylabel="samples")
    axis.legend(frameon=False, fontsize="small")
