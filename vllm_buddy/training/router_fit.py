"""Fits a Decision Module to measured losses, so that it picks the best path of a library for each text.

A gradient through a hard top-k only says how the loss would change with a little more of a layer. Here the loss of
every path in a short list is measured on the same text, and the module learns to predict it. As in serving, the module
sees the first tokens of a text; the losses are those of the tokens after them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vllm_buddy.method import DecisionModule, path_of
from vllm_buddy.method.path import path_mask

STEPS = 600
HELD_OUT = 0.25  # share of the windows that is kept for the reported figures
TEMPERATURE = 0.02  # nats by which a path must be better to be clearly preferred
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class PathLosses:
    """Measured losses of the paths of one depth.

    paths: the static path first. losses: [num_windows, num_paths], nats per token after the context.
    """

    depth: int
    paths: Sequence[Sequence[int]]
    losses: np.ndarray


@dataclass(frozen=True)
class FitFigures:
    """Losses of one depth on the held-out windows, in nats per token.

    static: every window on the first path. routed: on the path that the module picks. oracle: on its best path.
    """

    depth: int
    static: float
    routed: float
    oracle: float
    num_windows: int


@dataclass(frozen=True)
class RouterFit:
    """A fitted Decision Module, with figures of the windows that it was not fitted to."""

    decision: DecisionModule
    figures: list[FitFigures]


def measure_paths(
    loss: Callable[[np.ndarray, torch.Tensor], np.ndarray],
    indices: np.ndarray,
    library: Mapping[int, Sequence[Sequence[int]]],
    depths: Sequence[int],
    num_layers: int,
) -> list[PathLosses]:
    """Measure the loss of every path on every window.

    loss: (sequence indices [batch], layer mask [num_layers]) -> nats per token after the context, [batch].
    """
    measured = []
    for depth in depths:
        masks = [torch.from_numpy(path_mask(path_of(layers), num_layers).copy()) for layers in library[depth]]
        columns = [loss(indices, mask) for mask in masks]
        measured.append(PathLosses(depth, library[depth], np.stack(columns, axis=1)))
    return measured


def fit_decision(
    means: torch.Tensor,
    newest: torch.Tensor,
    measured: Sequence[PathLosses],
    bias: torch.Tensor,
    width: int,
    seed: int,
) -> RouterFit:
    """Fit a Decision Module to measured losses.

    means, newest: [num_windows, value_dim], Value states of the context (see DecisionModule), float32.
    bias: [num_layers - 2], omega * standardise(prior), which Router adds to the scores.
    """
    num_windows, num_middle = len(means), len(bias)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(num_windows)
    held_out = torch.from_numpy(shuffled[: int(num_windows * HELD_OUT)])
    fitted = torch.from_numpy(shuffled[int(num_windows * HELD_OUT) :])
    members = [_membership(m.paths, num_middle) for m in measured]
    losses = [torch.from_numpy(m.losses).float() for m in measured]
    # Zero weights choose the static path of each depth until the data say otherwise.
    torch.manual_seed(seed)
    decision = DecisionModule(means.shape[1], num_middle, width)
    nn.init.zeros_(decision.w2.weight)
    nn.init.zeros_(decision.w2.bias)
    optimizer = torch.optim.AdamW(decision.parameters(), lr=3e-3, weight_decay=WEIGHT_DECAY)
    with torch.enable_grad():
        for _ in range(STEPS):
            scores = decision(means[fitted], newest[fitted]) + bias
            expected = torch.zeros(())
            for member, loss in zip(members, losses):
                choice = (scores @ member.T / TEMPERATURE).softmax(dim=-1)
                gap = loss[fitted] - loss[fitted][:, :1]
                expected = expected + (choice * gap).sum(dim=-1).mean()
            optimizer.zero_grad()
            expected.backward()
            optimizer.step()
    figures = []
    with torch.no_grad():
        scores = decision(means[held_out], newest[held_out]) + bias
        for m, member, loss in zip(measured, members, losses):
            rows = loss[held_out]
            chosen = rows.gather(1, (scores @ member.T).argmax(dim=-1, keepdim=True))
            static, routed, oracle = (float(part.mean()) for part in (rows[:, 0], chosen, rows.min(dim=-1).values))
            figures.append(FitFigures(m.depth, static, routed, oracle, len(held_out)))
    return RouterFit(decision, figures)


def _membership(paths: Sequence[Sequence[int]], num_middle: int) -> torch.Tensor:
    """Return [num_paths, num_middle], 1.0 where a path contains a middle layer."""
    return torch.tensor([[float(layer in path) for layer in range(1, num_middle + 1)] for path in map(set, paths)])
