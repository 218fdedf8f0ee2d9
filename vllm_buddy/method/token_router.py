"""Depth chosen per token: which of a few nested paths each token of a request runs, so that the mean is the budget.

BUDDY gives every token of a request the same number of layers. Tokens differ far more than requests do: a tenth of them
holds four tenths of what skipping costs. Here a request's budget is a mean over its tokens. For each token the router
estimates the excess, the KL divergence from the full model that each shallower path costs at that position, and takes

    argmin over d of  excess_d + price * d / num_layers ,  among the depths that the account allows.

The account makes the mean strict: at every position the layers executed so far are at most b * L * tokens. Layers that
a token does not use are saved, up to a limit, and none are borrowed. The price follows the account, so that savings are
spent: it is the price of the budget, lower while the account holds more than is wanted and higher while it holds less.
What is wanted grows with the request to half of the limit, so that a short request spends what it may.

The choice depends on token ids and settings alone, and for a position on the tokens up to it alone. So neither chunks
nor batch-mates nor preemption change it, and two requests of one budget with a common beginning run it alike.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from vllm_buddy.method.budget import ROUNDING
from vllm_buddy.method.path import LayerPath
from vllm_buddy.method.predictor import FoldedPredictor
from vllm_buddy.method.request_route import Run

DECAY = 0.5  # measured: with a mean over all tokens, mean divergence at 26 of 30 layers is 18% higher
_ROUNDED_AWAY = 60  # bits; float64 has 53
_SWING = 1.0  # the price is exp(_SWING) of the usual one where a half of the account is missing to what is wanted
_SAVED_PER_TOKEN = 0.25  # layers; half an account is wanted in the end, and a short request must not save for it


@dataclass(frozen=True)
class TokenRouter:
    """The nested paths, and the estimate of what each costs at a token.

    predictor: its context is the mean over the tokens so far, weighted by decay to the power of their distance; its
        newest token is that of the position. Its grid are the depths of `paths`, the last of which is the whole model.
    paths: one per depth of the grid, each a subset of the next.
    prices: (mean budget, price) points, ascending in budget: the price at which tokens have that mean.
    decay: in [0, 1). What a token needs follows from the few before it, not from a mean over all.
    """

    predictor: FoldedPredictor
    paths: tuple[LayerPath, ...]
    prices: tuple[tuple[float, float], ...]
    decay: float = DECAY

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), not {self.decay}")
        depths, num_layers = self.predictor.depths, self.predictor.num_layers
        if tuple(path.bit_count() for path in self.paths) != depths or depths[-1] != num_layers:
            raise ValueError(f"the paths must have the depths {depths}, the last of all {num_layers} layers")
        if any(shallow & ~deep for shallow, deep in pairwise(self.paths)):
            raise ValueError("each path must be a subset of the next")

    @property
    def num_layers(self) -> int:
        return self.predictor.num_layers

    @property
    def depths(self) -> tuple[int, ...]:
        return self.predictor.depths

    @property
    def horizon(self) -> int:
        """The number of tokens after which one has no more part in the recent mean than float64 rounds away."""
        return 1 if self.decay == 0 else math.ceil(-_ROUNDED_AWAY / math.log2(self.decay))

    def excess(self, recent: "RecentMean", token_ids: Sequence[int]) -> np.ndarray:
        """The expected excess of each path at each of the next tokens, in nats: [n, len(depths)].

        recent: of the tokens before; the new ones are added to it.
        """
        return self.excess_at(recent.after(token_ids), token_ids)

    def excess_at(self, means: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
        """The same where the recent means are known. means: [n, r], float64, overwritten."""
        decision = self.predictor.decision
        half = means
        half += decision.table_newest[np.asarray(token_ids)]
        half += decision.b1
        half *= 0.5
        half += half * np.tanh(half)  # SiLU of 2 * half, as in FoldedDecision.scores
        # Not a matrix product, whose rounding depends on the number of rows.
        scores = (half[:, None, :] * decision.w2).sum(axis=-1) + decision.b2
        result = np.zeros((len(scores), len(self.depths)))
        result[:, :-1] = np.logaddexp(0.0, scores)[:, ::-1].cumsum(axis=1)[:, ::-1]
        return result

    def recent_mean(self) -> "RecentMean":
        """What `excess` knows of a request at its beginning."""
        return RecentMean(self.predictor.decision.table_context, self.decay)

    def price(self, budget: float) -> float:
        """The price at which tokens run `budget` of the layers on average, in nats for all layers."""
        budgets, prices = zip(*self.prices)
        return float(np.interp(budget, budgets, prices))


@dataclass(frozen=True)
class TokenSchedule:
    """How tokens are routed one by one.

    saved: the largest number of layers that the account holds.
    lag: the decision for the token at position p sees tokens up to p - lag; see PathSchedule.
    """

    saved: int = 240
    lag: int = 0

    def __post_init__(self) -> None:
        if self.saved < 0 or self.lag < 0:
            raise ValueError(f"saved and lag must not be negative: {self}")


@dataclass
class RecentMean:
    """The decaying mean of context rows. Updated token by token, so that it is the same for every chunking."""

    table: np.ndarray
    decay: float
    mean: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.mean = np.zeros(self.table.shape[1], dtype=np.float64)

    def after(self, token_ids: Sequence[int]) -> np.ndarray:
        """[n, r], the mean after each of the next tokens."""
        rows = self.table[np.asarray(token_ids)] * np.float64(1 - self.decay)
        for row in rows:
            row += self.decay * self.mean
            self.mean = row
        self.mean = self.mean.copy()  # the caller may overwrite the rows
        return rows


class TokenRoute:
    """The paths of one request whose tokens are routed one by one, decided in order of position and never revised.

    A Route. budget: of the request, at least that of the shallowest path. start: the first position that is routed so;
    those before it are part of the context, and of no account. shares_one_path: KV can be shared only of tokens that,
    like all before them, ran one path, because layers keep entries of executed tokens alone (KV policy masked).
    """

    def __init__(
        self,
        router: TokenRouter,
        schedule: TokenSchedule,
        budget: float,
        prompt_token_ids: Sequence[int],
        start: int = 0,
        *,
        shares_one_path: bool = False,
    ) -> None:
        self.router = router
        self.depth = math.floor(budget * router.num_layers + ROUNDING)
        if self.depth < router.depths[0]:
            raise ValueError(f"budget {budget:g} is below {router.depths[0]} layers, the shallowest path")
        self.lowered: list[tuple[int, int]] = []
        self._schedule = schedule
        self._recent = router.recent_mean()
        self._excess: list[list[float]] = []  # of the tokens that decisions still to be made see
        # Of a prompt that is not routed, what the first decision sees of it.
        self._num_seen = max(0, start - schedule.lag - router.horizon)
        self._balance = 0.0
        self._set_budget(budget)
        self._start = start
        self._choices = bytearray()  # index of the path of each position from `start` on
        self._shares_one_path = shares_one_path
        self._changed: int | None = None  # the first position of another path than the first one
        self.first_path = router.paths[0]
        if start == 0:
            self.decide(1, prompt_token_ids)
            self.first_path = router.paths[self._choices[0]]
        self._key = f"token {budget!r} {schedule.saved} {schedule.lag}" if budget < 1.0 else None

    def _set_budget(self, budget: float) -> None:
        self._rate = budget * self.router.num_layers
        self._price = self.router.price(budget)

    @property
    def choices(self) -> np.ndarray:
        """[number of positions decided], the index of each position's path."""
        return np.array(self._choices, dtype=np.int64)

    @property
    def cache_key(self) -> str | None:
        """Budget and schedule; None at full depth."""
        return self._key

    @property
    def num_decisions(self) -> int:
        return len(self._choices)

    @property
    def num_reroutes(self) -> int:
        """How often the path changed from one token to the next."""
        return self.num_changes(0)

    def num_changes(self, after: int) -> int:
        """See Route."""
        return int(np.count_nonzero(np.diff(self.choices[max(0, after - self._start) :])))

    def distinct_paths(self, start: int = 0) -> set[LayerPath]:
        """See Route."""
        return {self.router.paths[choice] for choice in set(self._choices[max(0, start - self._start) :])}

    @property
    def uniform_length(self) -> int | None:
        """See Route: the tokens before the budget was lowered, or before the first change of path."""
        lowered = self.lowered[0][0] if self.lowered else None
        if not self._shares_one_path or self._changed is None:
            return lowered
        return self._changed if lowered is None else min(lowered, self._changed)

    @property
    def limits_sharing(self) -> bool:
        return self._shares_one_path

    def lower(self, depth: int, position: int, token_ids: Sequence[int]) -> bool:
        """Spend `depth` layers a token on average from `position` on, which no run was asked for yet.

        Returns False, and nothing changes, below the shallowest path.
        """
        del token_ids
        if depth >= self.depth:
            raise ValueError(f"{depth} layers are not less than {self.depth}")
        if depth < self.router.depths[0] or position < self._start + len(self._choices):
            return False
        self.depth = depth
        self.lowered.append((position, depth))
        self._set_budget(depth / self.router.num_layers)
        return True

    def copy(self) -> "TokenRoute":
        """See Route."""
        result = copy.copy(self)
        result._recent, result.lowered = copy.copy(self._recent), [*self.lowered]
        result._excess, result._choices = [*self._excess], self._choices[:]
        return result

    def decide(self, end: int, token_ids: Sequence[int]) -> None:
        """See Route."""
        start = self._start + len(self._choices)
        if end <= start:
            return
        seen = max(1, end - self._schedule.lag)
        if seen > len(token_ids):
            raise RuntimeError(f"the path at position {end - 1} needs {seen} tokens, {len(token_ids)} are known")
        if seen > self._num_seen:
            self._excess += self.router.excess(self._recent, token_ids[self._num_seen : seen]).tolist()
            self._num_seen = seen
        # The row of position p is that of token p - lag, and of token 0 before there is one.
        first = self._num_seen - len(self._excess)
        lag = self._schedule.lag
        self._spend([self._excess[max(position - lag, 0) - first] for position in range(start, end)])
        del self._excess[: max(0, max(end - lag, 0) - first)]
        if self._changed is None:
            new = range(max(start, self._start + 1), end)
            self._changed = next((p for p in new if self._choices[p - self._start] != self._choices[0]), None)

    def _spend(self, excess: Sequence[Sequence[float]]) -> None:
        """Choose a path for each row of `excess`, and keep the account."""
        depths, num_layers = self.router.depths, self.router.num_layers
        balance, rate, saved = self._balance, self._rate, float(self._schedule.saved)
        half = max(saved / 2, 1.0)
        for row in excess:
            wanted = min(half, _SAVED_PER_TOKEN * len(self._choices))
            per_layer = self._price * math.exp(_SWING * (wanted - balance) / half) / num_layers
            balance += rate
            best, least = 0, math.inf
            for index, depth in enumerate(depths):
                if depth > balance + ROUNDING:
                    break
                cost = row[index] + per_layer * depth
                if cost <= least:  # of equal costs the deeper one
                    best, least = index, cost
            balance = min(balance - depths[best], saved)
            self._choices.append(best)
        self._balance = balance

    def sees_next(self, token_ids: Sequence[int]) -> bool:
        """Whether one token is known that no decision has seen, and no more."""
        return len(token_ids) == self._num_seen + 1

    def runs(self, start: int, num_tokens: int, token_ids: Sequence[int]) -> list[Run]:
        """See Route."""
        end = start + num_tokens
        self.decide(end, token_ids)
        if num_tokens == 1:
            return [Run(1, self.router.paths[self._choices[start - self._start]])]
        choices = np.array(self._choices[start - self._start : end - self._start], dtype=np.int64)
        changes = np.flatnonzero(np.diff(choices)) + 1
        bounds = [0, *changes.tolist(), num_tokens]
        return [Run(b - a, self.router.paths[choices[a]]) for a, b in pairwise(bounds)]


def see_newest(routes: Sequence[TokenRoute], token_ids: Sequence[int]) -> None:
    """Let each route see its next token: the same as one by one, at the cost of one.

    routes: of one router. token_ids: [len(routes)].
    """
    router = routes[0].router
    means = np.stack([route._recent.mean for route in routes])
    means *= router.decay
    means += router.predictor.decision.table_context[np.asarray(token_ids)] * np.float64(1 - router.decay)
    kept = means.copy()
    rows = router.excess_at(means, token_ids).tolist()
    for route, mean, row in zip(routes, kept, rows):
        route._recent.mean = mean
        route._excess.append(row)
        route._num_seen += 1
