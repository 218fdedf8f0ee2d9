"""Draws quality against layers executed: one panel per metric, one line per policy."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation.figures import Figure
from vllm_buddy.evaluation.policy import DENSE

# Metric -> (title of the panel, whether the scale is logarithmic).
_PANELS = {
    "perplexity": ("perplexity (lower is better)", True),
    "kl": ("KL to the unrouted model, nats per token", True),
    "agreement": ("greedy agreement with the unrouted model", False),
    "piqa_acc": ("PIQA accuracy", False),
    "piqa_acc_norm": ("PIQA accuracy per character", False),
}
_MARKERS = "osD^vPX*<>ph"
_COLUMNS = 3


def check_plotting() -> None:
    """Raise EvaluationError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EvaluationError("a plot needs matplotlib; pip install matplotlib, or leave out --plot")


def plot_figures(figures: Sequence[Figure], out: Path) -> None:
    """Draw `figures` to the file `out`, in the format of its suffix.

    Raises:
        EvaluationError: no figure can be drawn, matplotlib is missing, or the file cannot be written.
    """
    check_plotting()
    from matplotlib.figure import Figure as Canvas

    metrics = [metric for metric in _PANELS if any(figure.metric == metric for figure in figures)]
    if not metrics:
        raise EvaluationError(f"nothing to draw; the metrics that can be drawn are {', '.join(_PANELS)}")
    num_columns = min(_COLUMNS, len(metrics))
    num_rows = math.ceil(len(metrics) / num_columns)
    canvas = Canvas(figsize=(4.6 * num_columns, 3.6 * num_rows + 0.5), layout="constrained")
    axes = canvas.subplots(num_rows, num_columns, squeeze=False).flatten()
    for unused in axes[len(metrics) :]:
        unused.set_visible(False)
    policies = [p for p in dict.fromkeys(figure.policy for figure in figures) if p != DENSE]
    for axis, metric in zip(axes, metrics):
        _draw(axis, metric, [figure for figure in figures if figure.metric == metric], policies)
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    save_canvas(canvas, out)


def save_canvas(canvas: Any, out: Path) -> None:
    """Write a matplotlib figure to the file `out`, in the format of its suffix.

    Raises:
        EvaluationError: the file cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot write the picture {out}: {error}") from None


def _draw(axis: Any, metric: str, figures: Sequence[Figure], policies: Sequence[str]) -> None:
    label, logarithmic = _PANELS[metric]
    dense = next((figure for figure in figures if figure.policy == DENSE), None)
    if dense is not None and not (logarithmic and dense.value <= 0):
        axis.axhline(dense.value, color="black", linewidth=1, linestyle="--", label="unrouted")
    for index, policy in enumerate(policies):
        # The KL of zero at full depth cannot be drawn on a logarithmic scale.
        points = sorted(
            (f for f in figures if f.policy == policy and not (logarithmic and f.value <= 0)), key=lambda f: f.layers
        )
        axis.errorbar(
            [f.layers for f in points],
            [f.value for f in points],
            yerr=[f.stderr for f in points],
            label=policy,
            color=f"C{index % 10}",
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            linewidth=1.5,
            capsize=2,
            zorder=3 + len(policies) - index,  # the first policy is drawn on top
        )
    if logarithmic:
        axis.set_yscale("log")
    axis.set_xticks(sorted({figure.layers for figure in figures}))
    axis.set_xlabel("layers executed per token")
    axis.set_title(label, fontsize=10)
    axis.grid(True, alpha=0.3)
