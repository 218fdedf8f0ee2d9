"""Searches the best static path of every depth, given that a bypass repairs each skipped layer.

This is SLEB's greedy search (arXiv 2402.09025) with two differences: it measures the divergence from the full model,
and it measures each candidate with the bypass in place. The layer that a bypass replaces best is not always the layer
whose removal without a bypass costs least.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.method.batched import dense_layer, embed
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.sharded import from_main, gathered
from vllm_buddy.training.objective import divergence, top_log_probs

TOP = 64  # logits of the full model that are compared
CANDIDATES = 6  # measured in each round: those that looked best in the round before


class RepairedPaths:
    """Measures KL(full model || path) on a text whose tokens all run the same path.

    token_ids: [num_sequences, length]. bypass: None skips layers without a repair.
    """

    def __init__(self, model: nn.Module, token_ids: torch.Tensor, bypass: Bypass | None) -> None:
        net: Any = model
        self._model, self._layers, self._head = net, net.model.layers, net.lm_head
        hidden, self._rotary = embed(model, token_ids.to(self._head.weight.device))
        self._bypass = bypass.to(hidden) if bypass is not None else None
        self._start = hidden
        full = net.model.norm(self._run(hidden, 0, set()))
        with gathered(self._head):
            self._teacher = top_log_probs(full, self._head.weight, min(TOP, len(self._head.weight)))

    def prefixes(self, skipped: set[int]) -> list[torch.Tensor]:
        """Return the hidden states before each layer when `skipped` layers are left out."""
        states = [self._start]
        for index in range(self.num_layers - 1):
            states.append(self._step(index, states[-1], index in skipped))
        return states

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def divergence(self, skipped: set[int], start: int = 0, hidden: torch.Tensor | None = None) -> float:
        """Return the divergence in nats per token. hidden: the state before layer `start`, if it is known."""
        hidden = self._run(self._start if hidden is None else hidden, start, skipped)
        with gathered(self._head):
            found = divergence(self._model.model.norm(hidden), self._head.weight, *self._teacher).mean()
        return from_main(self._model, float(found))  # the search goes where it is lowest, so all must see the same

    def _run(self, hidden: torch.Tensor, start: int, skipped: set[int]) -> torch.Tensor:
        for index in range(start, self.num_layers):
            hidden = self._step(index, hidden, index in skipped)
        return hidden

    def _step(self, index: int, hidden: torch.Tensor, skip: bool) -> torch.Tensor:
        if not skip:
            with gathered(self._layers[index]):  # the layers are not run in turn, so none is gathered ahead
                return dense_layer(self._layers[index], hidden, self._rotary)
        return hidden if self._bypass is None else self._bypass.apply(index, hidden)


@torch.no_grad()
def single_divergences(model: nn.Module, token_ids: torch.Tensor, bypass: Bypass | None) -> np.ndarray:
    """Return the divergence that skipping each middle layer alone causes: [num_layers - 2], nats per token."""
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
    """Return all middle layers in the order in which they are removed; the paths of all depths are nested.

    See search_removals.
    """
    return search_removals(RepairedPaths(model, token_ids, bypass), (), min_depth, report)


@torch.no_grad()
def search_removals(
    paths: RepairedPaths,
    gone: Sequence[int],
    min_depth: int,
    report: Callable[[int, int, float], None] = lambda *_: None,
) -> list[int]:
    """Return `gone`, then the other middle layers in the order in which they are removed.

    The order is searched down to `min_depth` layers. gone: layers that are removed already. report: called as
    report(layer removed, layers left, nats per token) after each removal.
    """
    num_layers = paths.num_layers
    order = list(gone)
    remaining = [layer for layer in range(1, num_layers - 1) if layer not in order]
    increase: dict[int, float] = {}
    current = paths.divergence(set(order)) if order else 0.0
    while num_layers - len(order) > min_depth:
        skipped = set(order)
        states = paths.prefixes(skipped)
        candidates = sorted(remaining, key=lambda layer: increase.get(layer, 0.0))
        candidates = candidates[:CANDIDATES] if increase else candidates
        measured = {layer: paths.divergence(skipped | {layer}, layer, states[layer]) for layer in candidates}
        increase.update({layer: value - current for layer, value in measured.items()})
        best = min(candidates, key=lambda layer: (measured[layer], layer))
        order.append(best)
        remaining.remove(best)
        current = measured[best]
        report(best, num_layers - len(order), current)
    # Below `min_depth` nothing is measured: the layer that cost least when it was last measured is removed first.
    return order + sorted(remaining, key=lambda layer: (increase.get(layer, 0.0), layer))
