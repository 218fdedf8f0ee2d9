"""SLEB (arXiv 2402.09025): removes the layer whose removal hurts least, measures the rest again, and repeats."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from vllm_buddy.importance.layer_stack import LayerStack


@torch.no_grad()
def sleb_order(model: nn.Module, windows: torch.Tensor, progress: Callable[[int, int], None]) -> list[int]:
    """Return the greedy order of the middle layers by calibration loss; of equal layers the deeper one goes first.

    A trial runs only the layers above the removed one, because the previous trial has run those below. All trials take
    about L^3 / 12 layer passes per window.

    windows: [num_windows, window] token ids.
    """
    stack = LayerStack(model, windows.shape[1])
    kept = list(range(stack.num_layers))
    order: list[int] = []
    num_middle = stack.num_layers - 2
    while len(kept) > 3:
        middle = kept[1:-1]
        losses = np.zeros(len(middle))
        for window in windows:
            hidden = stack.layer(0, stack.embed(window))
            for trial, layer in enumerate(middle):
                losses[trial] += float(stack.loss(stack.run(kept[trial + 2 :], hidden), window))
                hidden = stack.layer(layer, hidden)
        order.append(min(zip(losses.tolist(), middle), key=lambda pair: (pair[0], -pair[1]))[1])
        kept.remove(order[-1])
        progress(len(order), num_middle)
    order.append(kept[1])
    progress(num_middle, num_middle)
    return order
