"""Pruning orders that rank all layers once by their importance: ShortGPT and the two criteria of Shortened LLaMA.

ShortGPT (arXiv 2403.03853) uses Block Influence. Shortened LLaMA (arXiv 2402.02834) uses the increase in perplexity
when one layer is skipped, or the Taylor score. `vllm_buddy.importance` implements these measures, also for the prior.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from vllm_buddy.importance import find_indicator

Progress = Callable[[int, int], None]


def shortgpt_order(model: nn.Module, windows: torch.Tensor, progress: Progress) -> list[int]:
    """Return the middle layers, least Block Influence first. windows: [num_windows, window] token ids."""
    return _least_important_first(find_indicator("cosine").measure(model, windows, progress))


def delta_ppl_order(model: nn.Module, windows: torch.Tensor, progress: Progress) -> list[int]:
    """Return the middle layers, least increase in perplexity first. windows: [num_windows, window] token ids."""
    return _least_important_first(find_indicator("delta_ppl").measure(model, windows, progress))


def taylor_order(model: nn.Module, windows: torch.Tensor, progress: Progress) -> list[int]:
    """Return the middle layers, least Taylor score first. windows: [num_windows, window] token ids."""
    return _least_important_first(find_indicator("taylor").measure(model, windows, progress))


def _least_important_first(importance: np.ndarray) -> list[int]:
    """Sort layers by importance. Of equal layers the deeper one is removed first, as in the router's top-k."""
    return sorted(range(1, len(importance) + 1), key=lambda layer: (importance[layer - 1], -layer))
