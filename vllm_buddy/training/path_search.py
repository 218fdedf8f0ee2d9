"""The best static path of every depth, given that skipped layers are repaired.

SLEB's greedy search (arXiv 2402.09025) with two differences: what is measured is the divergence from the full model,
and each candidate is measured with its bypass in place. A layer that a bypass replaces well is not the one whose bare
removal hurts least.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.method.batched import dense_layer, embed
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.training.objective import divergence, top_log_probs

TOP = 64  # logits of the full model that are compared
CANDIDATES = 6  # of each round, those that looked best in the round before are measured again


class RepairedPaths:
    """Measures KL(full || path) on some text, for paths that are the same for all of it.

    token_ids: [num_sequences, length]. bypass None: skipped layers are left bare.
    """

    def __init__(self, model: nn.Module, token_ids: torch.Tensor, bypass: Bypass | None) -> None:
        net: Any = model
        self._layers, self._norm, self._head = net.model.layers, net.model.norm, net.lm_head.weight
        hidden, self._rotary = embed(model, token_ids.to(self._head.device))
        self._bypass = bypass.to(hidden) if bypass is not None else None
        self._start = hidden
        full = self._norm(self._run(hidden, 0, set()))
        self._teacher = top_log_probs(full, self._head, min(TOP, len(self._head)))

    def prefixes(self, skipped: set[int]) -> list[torch.Tensor]:
        """Hidden states before every layer when `skipped` are left out."""
        states = [self._start]
        for index in range(len(self._layers) - 1):
            states.append(self._step(index, states[-1], index in skipped))
        return states

    def divergence(self, skipped: set[int], start: int = 0, hidden: torch.Tensor | None = None) -> float:
        """Nats per token. hidden: the state before layer `start`, if it is known."""
        hidden = self._run(self._start if hidden is None else hidden, start, skipped)
        return float(divergence(self._norm(hidden), self._head, *self._teacher).mean())

    def _run(self, hidden: torch.Tensor, start: int, skipped: set[int]) -> torch.Tensor:
        for index in range(start, len(self._layers)):
            hidden = self._step(index, hidden, index in skipped)
        return hidden

    def _step(self, index: int, hidden: torch.Tensor, skip: bool) -> torch.Tensor:
        if not skip:
            return dense_layer(self._layers[index], hidden, self._rotary)
        return hidden if self._bypass is None else self._bypass.apply(index, hidden)


@torch.no_grad()
def single_divergences(model: nn.Module, token_ids: torch.Tensor, bypass: Bypass | None) -> np.ndarray:
    """What skipping each middle layer alone costs: [num_layers - 2], nats per token from the full model."""
    paths = RepairedPaths(model, token_ids, bypass)
    states = paths.prefixes(set())
    return np.array([paths.divergence({layer}, layer, states[layer]) for layer in range(1, len(states) - 1)])


@torch.no_grad()
def removal_order(
    model: nn.Module,
    token_ids: torch.Tensor,
    bypass: Bypass | None,
    min_depth: int,
    report: Callable[[int, int, float], None] = lambda *_: None,
) -> list[int]:
    """All middle layers in the order they leave, searched down to `min_depth` layers. Paths of all depths are nested.

    report: called as report(layer left out, layers left, nats per token) after each removal.
    """
    paths = RepairedPaths(model, token_ids, bypass)
    num_layers = len(paths._layers)
    remaining = list(range(1, num_layers - 1))
    order: list[int] = []
    increase: dict[int, float] = {}
    current = 0.0
    while num_layers - len(order) > min_depth:
        skipped = set(order)
        states = paths.prefixes(skipped)
        candidates = sorted(remaining, key=lambda layer: increase.get(layer, 0.0))
        candidates = candidates if not order else candidates[:CANDIDATES]
        measured = {layer: paths.divergence(skipped | {layer}, layer, states[layer]) for layer in candidates}
        increase.update({layer: value - current for layer, value in measured.items()})
        best = min(candidates, key=lambda layer: (measured[layer], layer))
        order.append(best)
        remaining.remove(best)
        current = measured[best]
        report(best, num_layers - len(order), current)
    # Below the smallest depth nobody looked: what hurt least when it was last measured leaves first.
    return order + sorted(remaining, key=lambda layer: (increase[layer], layer))
