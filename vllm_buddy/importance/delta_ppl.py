"""The increase in perplexity when one layer is skipped and all others run.

Each layer is measured once and alone (Shortened LLaMA, arXiv 2402.02834, section 3.2). Layers that can replace each
other therefore look unimportant.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from vllm_buddy.importance.layer_stack import LayerStack


@torch.no_grad()
def perplexity_increase(model: nn.Module, windows: torch.Tensor, progress: Callable[[int, int], None]) -> np.ndarray:
    """Return the increase in perplexity per skipped middle layer.

    windows: [num_windows, window] token ids. Returns [num_layers - 2], float64; negative where skipping helps.
    """
    stack = LayerStack(model, windows.shape[1])
    last = stack.num_layers - 1
    dense = 0.0
    skipping = np.zeros(last - 1)
    for done, window in enumerate(windows, start=1):
        hidden = stack.layer(0, stack.embed(window))
        for skipped in range(1, last):
            # The layers below the skipped one run once for all trials; only those above it run again.
            rest = stack.run(range(skipped + 1, last + 1), hidden)
            skipping[skipped - 1] += float(stack.loss(rest, window))
            hidden = stack.layer(skipped, hidden)
        dense += float(stack.loss(stack.layer(last, hidden), window))
        progress(done, len(windows))
    return np.exp(skipping / len(windows)) - np.exp(dense / len(windows))
