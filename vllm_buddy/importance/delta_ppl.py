"""How much the perplexity rises when one layer is skipped and all others run.

One-shot, one layer at a time (Shortened LLaMA, arXiv 2402.02834, section 3.2). Layers that only matter together look
unimportant to it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from vllm_buddy.importance.layer_stack import LayerStack


@torch.no_grad()
def perplexity_increase(model: nn.Module, windows: torch.Tensor, progress: Callable[[int, int], None]) -> np.ndarray:
    """windows: [num_windows, window] token ids -> [num_layers - 2], float64; negative where skipping helps."""
    stack = LayerStack(model, windows.shape[1])
    last = stack.num_layers - 1
    dense = 0.0
    skipping = np.zeros(last - 1)
    for done, window in enumerate(windows, start=1):
        hidden = stack.layer(0, stack.embed(window))
        for skipped in range(1, last):
            # Layers below the skipped one have run once for all; only those above run again.
            rest = stack.run(range(skipped + 1, last + 1), hidden)
            skipping[skipped - 1] += float(stack.loss(rest, window))
            hidden = stack.layer(skipped, hidden)
        dense += float(stack.loss(stack.layer(last, hidden), window))
        progress(done, len(windows))
    return np.exp(skipping / len(windows)) - np.exp(dense / len(windows))
