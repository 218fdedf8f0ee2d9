"""Orders that rank all layers once by a static importance: ShortGPT, and Shortened LLaMA's two criteria.

ShortGPT (arXiv 2403.03853): Block Influence. Shortened LLaMA (arXiv 2402.02834): the rise in perplexity when one
layer is skipped, or the Taylor score. The measures are those of the prior, see vllm_buddy.importance.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from vllm_buddy.importance import find_indicator

Progress = Callable[[int, int], None]


def shortgpt_order(model: nn.Module, windows: torch.Tensor, progress: Progress) -> list[int]:
    """Least Block Influence first. windows: [num_windows, window] token ids -> the middle layers."""
    return _least_important_first(find_indicator("cosine").measure(model, windows, progress))


def delta_ppl_order(model: nn.Module, windows: torch.Tensor, progress: Progress) -> list[int]:
    """Least rise in perplexity first. windows: [num_windows, window] token ids -> the middle layers."""
    return _least_important_first(find_indicator("delta_ppl").measure(model, windows, progress))


def taylor_order(model: nn.Module, windows: torch.Tensor, progress: Progress) -> list[int]:
    """Least Taylor score first. windows: [num_windows, window] token ids -> the middle layers."""
    return _least_important_first(find_indicator("taylor").measure(model, windows, progress))


def _least_important_first(importance: np.ndarray) -> list[int]:
    """Of equals the deeper layer leaves first, as in the router's top-k."""
    return sorted(range(1, len(importance) + 1), key=lambda layer: (importance[layer - 1], -layer))
