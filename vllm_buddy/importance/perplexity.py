"""Measures the perplexity of a fixed set of layers, which shows the quality of a prior without any training."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from vllm_buddy.importance.layer_stack import LayerStack
from vllm_buddy.method import depth_for_budget, layers_of, top_k_path
from vllm_buddy.method.budget import MIN_DEPTH

BUDGETS = (1.0, 0.9, 0.75, 0.5)


@torch.no_grad()
def static_perplexity(model: nn.Module, windows: torch.Tensor, layers: Sequence[int]) -> float:
    """Return exp of the mean next-token loss when every token runs only `layers`.

    With one path for all tokens, the KV policy `masked` equals the model without the other layers.

    windows: [num_windows, window] token ids; each window is scored by itself.
    """
    stack = LayerStack(model, windows.shape[1])
    losses = [float(stack.loss(stack.run(layers, stack.embed(window)), window)) for window in windows]
    return math.exp(sum(losses) / len(losses))


def perplexity_by_budget(
    model: nn.Module, windows: torch.Tensor, priors: Mapping[str, np.ndarray]
) -> dict[str, dict[float, float]]:
    """Return the perplexity by prior name and by budget, for each of BUDGETS that the model allows.

    Equal paths run once.
    """
    num_layers = len(next(iter(priors.values()))) + 2
    known: dict[int, float] = {}
    table: dict[str, dict[float, float]] = {}
    for name, prior in priors.items():
        table[name] = {}
        for budget in BUDGETS:
            if budget * num_layers < MIN_DEPTH:
                continue
            path = top_k_path(prior, depth_for_budget(budget, num_layers))
            if path not in known:
                known[path] = static_perplexity(model, windows, layers_of(path))
            table[name][budget] = known[path]
    return table
