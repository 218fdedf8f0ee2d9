"""Draws the loss curve of a training run from its log file."""

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from vllm_buddy.errors import TrainingError

CURVES_FILE = "curves.png"
BANDS = 3  # the served depths are divided into this many lines
SMOOTHING = 0.1  # each point is the mean over this share of the run


def read_log(path: Path) -> list[dict]:
    """Return the rows of log.jsonl, one per optimizer step."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def check_plotting() -> None:
    """Raise a TrainingError if matplotlib is missing. It is not loaded: of several processes one will draw."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TrainingError("curves need matplotlib: pip install matplotlib")


def pyplot() -> Any:
    """Return matplotlib.pyplot with a backend that draws to files.

    Raises:
        TrainingError: matplotlib is not installed.
    """
    check_plotting()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_curves(log: Path, out: Path, title: str) -> None:
    """Draw the loss against training tokens, one line for each band of depths.

    Raises:
        TrainingError: matplotlib is not installed.
    """
    plt = pyplot()
    rows = read_log(log)
    points = np.array([(row["tokens"], depth, loss) for row in rows for depth, loss in row["losses"]])
    edges = np.linspace(points[:, 1].min(), points[:, 1].max() + 1e-6, BANDS + 1)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for low, high in itertools.pairwise(edges):
        band = points[(points[:, 1] >= low) & (points[:, 1] < high)]
        if len(band) == 0:
            continue
        width = max(1, int(len(band) * SMOOTHING))
        smooth = np.convolve(band[:, 2], np.ones(width) / width, mode="valid")
        axes.plot(band[width - 1 :, 0] / 1e3, smooth, label=f"{np.ceil(low):.0f} to {np.ceil(high) - 1:.0f} layers")
    axes.set(xlabel="training tokens (thousands)", ylabel="loss (nats per token)", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(title="layers executed", frameon=False, loc="outside right upper")
    figure.savefig(out, dpi=130)
    plt.close(figure)
