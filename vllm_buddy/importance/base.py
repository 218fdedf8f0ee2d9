"""The indicators: the measures of layer importance, by name."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vllm_buddy.errors import CalibrationError
from vllm_buddy.importance.cosine import cosine_dissimilarity
from vllm_buddy.importance.delta_ppl import perplexity_increase
from vllm_buddy.importance.taylor import taylor_importance

Progress = Callable[[int, int], None]
Measure = Callable[[nn.Module, torch.Tensor, Progress], np.ndarray]


@dataclass(frozen=True)
class Indicator:
    """A measure of how much a layer matters.

    measure: (model, windows [num_windows, window] of token ids, progress(done, total)) -> [num_layers - 2], float64,
        larger is more important.
    log_scale: whether the values span orders of magnitude and are compared after log(1 + x) (BUDDY, section 3.3).
    title: short description for model cards.
    """

    measure: Measure
    log_scale: bool
    title: str


INDICATORS = {
    "taylor": Indicator(taylor_importance, True, "Taylor, sum of |w * gradient|"),
    "delta_ppl": Indicator(perplexity_increase, True, "perplexity added by skipping the layer"),
    "cosine": Indicator(cosine_dissimilarity, False, "Block Influence, 1 - cos(input, output)"),
}


def find_indicator(name: str) -> Indicator:
    """Return the indicator `name`.

    Raises:
        CalibrationError: the name is unknown; the message lists the known ones.
    """
    if name not in INDICATORS:
        raise CalibrationError(f"unknown indicator '{name}'; known are {', '.join(INDICATORS)}")
    return INDICATORS[name]
