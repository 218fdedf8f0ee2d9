"""First-order Taylor importance: an estimate of how much the loss changes if a layer's weights are set to zero.

It is the sum over a layer's weights of |w * dL/dw| (Shortened LLaMA, arXiv 2402.02834, section 3.2). L is the mean loss
over all windows.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.importance.layer_stack import LayerStack


def taylor_importance(model: nn.Module, windows: torch.Tensor, progress: Callable[[int, int], None]) -> np.ndarray:
    """Return the Taylor importance per middle layer.

    Gradients are summed over windows in float32, whatever the model's dtype; this needs memory for those of all middle
    layers.

    windows: [num_windows, window] token ids. Returns [num_layers - 2], float64.
    """
    stack = LayerStack(model, windows.shape[1])
    backbone: Any = model.model
    wanted_before = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    middle = backbone.layers[1:-1]
    sums = [{p: torch.zeros_like(p, dtype=torch.float32) for p in layer.parameters()} for layer in middle]
    hooks = []
    try:
        for parameter, gradient in chain.from_iterable(part.items() for part in sums):
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(partial(_move, gradient)))
        for done, window in enumerate(windows, start=1):
            with torch.enable_grad():
                hidden = stack.run(range(stack.num_layers), stack.embed(window))
                (stack.loss(hidden, window) / len(windows)).backward()
            progress(done, len(windows))
        return np.array([sum(_weight_times_gradient(p, g) for p, g in part.items()) for part in sums])
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, wanted in wanted_before.items():
            parameter.grad = None
            parameter.requires_grad_(wanted)


def _move(into: torch.Tensor, parameter: nn.Parameter) -> None:
    """Add a parameter's gradient to `into`, and free it."""
    assert parameter.grad is not None
    into += parameter.grad
    parameter.grad = None


def _weight_times_gradient(parameter: nn.Parameter, gradient: torch.Tensor) -> float:
    return float((parameter.detach() * gradient).abs().sum(dtype=torch.float64))
