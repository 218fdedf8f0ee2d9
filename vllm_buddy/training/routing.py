"""Chooses the layers that each training sequence, or each of its tokens, runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from vllm_buddy.method import DecisionModule, LayerPath, full_path, path_of
from vllm_buddy.method.path import path_mask
from vllm_buddy.method.router import standardised
from vllm_buddy.method.token_router import TokenRoute, TokenRouter, TokenSchedule
from vllm_buddy.training.observations import UNROUTED

SWITCHED = 0.25  # share of the sequences whose path changes midway, as it may when a request is routed again
SHORTEST_CONTEXT = 16  # tokens that a path is decided from, at least
FULL_PROMPTS = (0.1, 0.75)  # shares of a sequence between which a prompt at full depth ends
CONSTANT_SHARE = 0.2  # share of the sequences of schedule `token` that run one path
SHUFFLED_SHARE = 0.15  # share of those whose depths are dealt to tokens at random
FREE_NATS = 0.05  # a layer that costs this many nats is skipped half as often as one that costs nothing


@dataclass(frozen=True)
class Routed:
    """The paths of a batch.

    masks: [batch, length, num_layers], bool: which token runs which layer.
    gates: [batch, num_layers], 0 or 1 with a gradient for the scores; None if scores are not trained.
    choices: [batch, length], int8, index of each token's path, or UNROUTED in sequences on one path; None: depths are
        not chosen per token.
    """

    masks: torch.Tensor
    gates: torch.Tensor | None = None
    choices: np.ndarray | None = None


class Routing(Protocol):
    """A way to choose paths in training."""

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters."""
        ...

    def route(self, token_ids: torch.Tensor, depths: Sequence[int], rng: np.random.Generator) -> Routed:
        """Choose the paths of a batch. token_ids: [batch, length]; depths: [batch], layers that each sequence runs."""
        ...


class LibraryRouting:
    """Draws paths from a list for each depth: mostly the first, sometimes another, and sometimes two in a row.

    interval: a path changes at a multiple of this many tokens, as in serving; 0: paths do not change. first_share: of
    the sequences, run the first path of their depth; the others draw one of the rest. full_prompt_share: of the
    sequences, run all layers at first, as requests do whose prompt runs at full depth.
    """

    def __init__(
        self,
        num_layers: int,
        library: Mapping[int, Sequence[Sequence[int]]],
        interval: int,
        first_share: float,
        full_prompt_share: float = 0.0,
    ) -> None:
        self._num_layers, self._first_share, self._full_prompt_share = num_layers, first_share, full_prompt_share
        self._library = {depth: [path_of(layers) for layers in sets] for depth, sets in library.items()}
        self._interval = interval

    def parameters(self) -> list[nn.Parameter]:
        return []

    def route(self, token_ids: torch.Tensor, depths: Sequence[int], rng: np.random.Generator) -> Routed:
        length = token_ids.shape[1]
        masks = np.empty((len(depths), length, self._num_layers), dtype=bool)
        for row, depth in enumerate(depths):
            masks[row] = path_mask(self._draw(depth, rng), self._num_layers)
            if self._interval and len(self._library.get(depth, ())) > 1 and rng.random() < SWITCHED:
                change = int(rng.integers(1, max(2, length // self._interval))) * self._interval
                masks[row, change:] = path_mask(self._draw(depth, rng), self._num_layers)
            # Without such a share nothing is drawn, so that earlier runs can be repeated.
            if self._full_prompt_share and rng.random() < self._full_prompt_share:
                masks[row, : int(rng.uniform(*FULL_PROMPTS) * length)] = True
        return Routed(torch.from_numpy(masks))

    def _draw(self, depth: int, rng: np.random.Generator) -> LayerPath:
        if depth == self._num_layers:
            return full_path(self._num_layers)
        paths = self._library[depth]
        if len(paths) == 1 or rng.random() < self._first_share:
            return paths[0]
        return paths[int(rng.integers(1, len(paths)))]


class RandomRouting:
    """Draws paths at random, so that each bypass is trained with many combinations of layers before paths are compared.

    divergence: [num_layers - 2], nats that skipping each middle layer costs; cheap layers are skipped more often.
    """

    def __init__(self, divergence: np.ndarray) -> None:
        self._num_layers = len(divergence) + 2
        weights = 1 / (np.maximum(divergence, 0) + FREE_NATS)
        self._chance = weights / weights.sum()

    def parameters(self) -> list[nn.Parameter]:
        return []

    def route(self, token_ids: torch.Tensor, depths: Sequence[int], rng: np.random.Generator) -> Routed:
        masks = np.ones((len(depths), 1, self._num_layers), dtype=bool)
        for row, depth in enumerate(depths):
            count = self._num_layers - depth
            skipped = rng.choice(len(self._chance), size=count, replace=False, p=self._chance) + 1
            masks[row, :, skipped] = False
        return Routed(torch.from_numpy(masks).expand(-1, token_ids.shape[1], -1))


class LearnedRouting:
    """A Decision Module trained through a hard top-k (BUDDY, section 3.3).

    Forward: the k highest of s' = s + omega * standardise(prior). Backward: straight-through, as if the choice were a
    sigmoid around the threshold between chosen and other scores. Each sequence is routed once, from a random number of
    its first tokens.

    values: [vocab_size, value_dim], see decision.value_table; on the device of the token ids.
    prior: [num_layers - 2], larger for more important layers.
    """

    def __init__(self, decision: DecisionModule, values: torch.Tensor, prior: np.ndarray) -> None:
        self.decision = decision
        self._values = values
        self._bias = torch.from_numpy(standardised(np.asarray(prior, dtype=np.float64))).to(values)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.decision.parameters())

    def route(self, token_ids: torch.Tensor, depths: Sequence[int], rng: np.random.Generator) -> Routed:
        batch, length = token_ids.shape
        num_layers = len(self._bias) + 2
        contexts = [int(rng.integers(min(SHORTEST_CONTEXT, length), length + 1)) for _ in range(batch)]
        means = torch.stack([self._values[row[:n]].mean(dim=0) for row, n in zip(token_ids, contexts)])
        newest = self._values[torch.stack([row[n - 1] for row, n in zip(token_ids, contexts)])]
        scores = self.decision(means, newest) + self._bias
        # The sort is stable: of equal scores the lower layer is chosen, as in path.top_k_path.
        ranked, order = scores.sort(dim=-1, descending=True, stable=True)
        gates = torch.ones(batch, num_layers, device=scores.device)
        for row, depth in enumerate(depths):
            k = depth - 2
            if depth == num_layers:
                continue
            threshold = (ranked[row, k - 1] + ranked[row, k]).detach() / 2
            soft = torch.sigmoid(scores[row] - threshold)
            hard = torch.zeros_like(soft)
            hard[order[row, :k]] = 1.0
            gates[row, 1:-1] = hard + soft - soft.detach()
        masks = (gates.detach() > 0.5)[:, None].expand(-1, length, -1)
        return Routed(masks, gates)


class TokenRouting:
    """Gives each token of a sequence a path of its own, as the schedule `token` does; `depths` are means then.

    Some sequences run a constant path all the same, so that the bypasses stay good for requests of one path. The choice
    of some others ignores the router, so that every token is met at every depth.

    constant: what draws the paths of sequences that run one path.
    """

    def __init__(self, router: TokenRouter, schedule: TokenSchedule, constant: LibraryRouting) -> None:
        self.router = router
        self._schedule = schedule
        self._constant = constant

    def parameters(self) -> list[nn.Parameter]:
        return []

    def route(self, token_ids: torch.Tensor, depths: Sequence[int], rng: np.random.Generator) -> Routed:
        num_layers, length = self.router.num_layers, token_ids.shape[1]
        by_path = np.stack([path_mask(path, num_layers) for path in self.router.paths])
        masks = np.empty((len(depths), length, num_layers), dtype=bool)
        choices = np.full((len(depths), length), UNROUTED, dtype=np.int8)
        for row, depth in enumerate(depths):
            draw = rng.random()
            if draw < CONSTANT_SHARE or depth < self.router.depths[0]:
                masks[row] = self._constant.route(token_ids[row][None], [depth], rng).masks[0].numpy()
                continue
            choices[row] = self._choices(token_ids[row], depth)
            if draw < CONSTANT_SHARE + SHUFFLED_SHARE:
                rng.shuffle(choices[row])
            masks[row] = by_path[choices[row]]
        return Routed(torch.from_numpy(masks), choices=choices)

    def _choices(self, token_ids: torch.Tensor, depth: int) -> np.ndarray:
        ids = token_ids.tolist()
        route = TokenRoute(self.router, self._schedule, depth / self.router.num_layers, ids)
        route.decide(len(ids), ids)
        return route.choices


def draw_depths(num_layers: int, smallest: int, count: int, rng: np.random.Generator, *, full: bool) -> list[int]:
    """Draw a depth for each sequence, uniformly from `smallest` up. full: whether the full depth is included."""
    return [int(depth) for depth in rng.integers(smallest, num_layers + full, size=count)]
