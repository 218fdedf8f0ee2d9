"""Tests of depths per token: the account, and what a decision depends on."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.tiny_models import NUM_LAYERS, VOCAB_SIZE, random_token_router
from vllm_buddy.method import (
    FoldedDecision,
    FoldedPredictor,
    TokenRoute,
    TokenRouter,
    TokenSchedule,
    full_path,
    path_of,
)
from vllm_buddy.method.token_router import see_newest

ROUNDING = 1e-9  # of sums in float64, in another order
ROUTER = random_token_router(torch.randn(VOCAB_SIZE, 12, generator=torch.Generator().manual_seed(3)), (4, 6), 8, 5)
TOKENS = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=120)
BUDGETS = st.sampled_from([0.5, 0.6, 0.625, 0.75, 0.875, 0.99, 1.0])
SCHEDULES = st.builds(TokenSchedule, st.sampled_from([0, 3, 12, 480]), st.sampled_from([0, 0, 1, 3]))


def depths_of(route: TokenRoute, num_tokens: int, token_ids: Sequence[int]) -> list[int]:
    """Return the depth of each of the first tokens; checks that the runs cover them one by one."""
    runs = route.runs(0, num_tokens, token_ids)
    assert sum(run.num_tokens for run in runs) == num_tokens
    assert all(run.num_tokens > 0 for run in runs)
    assert all(before.path != after.path for before, after in pairwise(runs))
    return [run.path.bit_count() for run in runs for _ in range(run.num_tokens)]


@given(TOKENS, BUDGETS, SCHEDULES)
def test_no_prefix_spends_more_than_its_budget(tokens: list[int], budget: float, schedule: TokenSchedule) -> None:
    """Fails if layers are borrowed from later tokens, or more are saved than the limit allows."""
    depths = depths_of(TokenRoute(ROUTER, schedule, budget, tokens), len(tokens), tokens)
    spent = np.cumsum(depths)
    assert (spent <= budget * NUM_LAYERS * np.arange(1, len(tokens) + 1) + 1e-3).all()
    balance = 0.0
    for depth in depths:
        assert depth <= balance + budget * NUM_LAYERS + 1e-5
        balance = min(balance + budget * NUM_LAYERS - depth, schedule.saved)


@given(TOKENS, BUDGETS, SCHEDULES, st.data())
def test_chunks_change_nothing(tokens: list[int], budget: float, schedule: TokenSchedule, data: Any) -> None:
    """Fails if a path depends on where a chunk ends, on how much is known ahead, or on being asked again."""
    whole = depths_of(TokenRoute(ROUTER, schedule, budget, tokens), len(tokens), tokens)
    prompt = data.draw(st.integers(1, len(tokens)))
    route, done, depths = TokenRoute(ROUTER, schedule, budget, tokens[:prompt]), 0, []
    while done < len(tokens):
        known = max(prompt, done + 1)
        size = data.draw(st.integers(1, known - done))
        depths += [r.path.bit_count() for r in route.runs(done, size, tokens[:known]) for _ in range(r.num_tokens)]
        done += size
    assert depths == whole
    assert depths_of(route, len(tokens), tokens) == whole


@given(TOKENS, TOKENS, TOKENS, BUDGETS, SCHEDULES)
def test_a_decision_sees_no_later_token(
    tokens: list[int], one: list[int], other: list[int], budget: float, schedule: TokenSchedule
) -> None:
    """Fails if KV of a common beginning could differ between requests of one budget, which share it."""
    routes = [TokenRoute(ROUTER, schedule, budget, tokens + rest) for rest in (one, other)]
    first, second = (depths_of(r, len(tokens), tokens + rest) for r, rest in zip(routes, (one, other), strict=True))
    assert first == second
    assert routes[0].cache_key == routes[1].cache_key
    assert routes[0].uniform_length is None


@given(TOKENS, st.integers(1, 4))
def test_a_lag_hides_the_newest_tokens(tokens: list[int], lag: int) -> None:
    """Fails if a decision needs a token that asynchronous scheduling has not seen yet."""
    route = TokenRoute(ROUTER, TokenSchedule(lag=lag), 0.75, tokens)
    known = tokens + [0] * lag
    route.decide(len(tokens) + lag, tokens)
    assert len(depths_of(route, len(known), tokens)) == len(known)
    with pytest.raises(RuntimeError, match="are known"):
        route.decide(len(tokens) + lag + 1, tokens)


def test_a_mean_of_one_token_gives_the_predictors_estimate() -> None:
    """Fails if the estimate of a token leaves out a part of what the predictor computes, such as its bias."""
    router = replace(ROUTER, decay=0.0)
    assert np.abs(router.predictor.decision.b1).min() > 0.01
    token_ids = list(range(0, VOCAB_SIZE, 7))
    alone = [router.predictor.excess([token]) for token in token_ids]
    assert router.excess(router.recent_mean(), token_ids) == pytest.approx(np.array(alone), abs=ROUNDING)


def given_excess(excess: Sequence[float], prices: tuple[tuple[float, float], ...]) -> TokenRouter:
    """Return a router in which token id i costs excess[i] nats at depth 4 of 8, and nothing at depth 8."""
    steps = np.log(np.expm1(np.array(excess, dtype=np.float64)))  # the inverse of softplus
    # SiLU(x) is x for large x: the shift by 50 is undone by the last bias.
    table = (steps[:, None] + 50.0).astype(np.float32)
    decision = FoldedDecision(
        np.zeros_like(table), table, np.zeros(1, np.float32), np.ones((1, 1), np.float32), np.full(1, -50, np.float32)
    )
    paths = (path_of([0, 2, 4, 7]), full_path(8))
    return TokenRouter(FoldedPredictor(decision, (4, 8), 8), paths, prices)


def test_tokens_that_lose_most_get_the_layers() -> None:
    """Fails if depth goes to tokens at random, or to those that need it least."""
    rng = np.random.default_rng(0)
    router = given_excess([0.01, 0.5, 2.0], ((0.5, 4.0), (1.0, 0.0)))
    tokens = rng.integers(0, 3, 600).tolist()
    depths = np.array(depths_of(TokenRoute(router, TokenSchedule(24), 0.75, tokens), 600, tokens))
    mean = [depths[np.array(tokens) == token].mean() for token in range(3)]
    assert mean[0] < mean[1] < mean[2]
    assert mean[2] > 7.5
    assert depths.mean() > 0.95 * 6  # savings are spent


def test_where_layers_keep_executed_tokens_alone_one_path_is_shared() -> None:
    """Fails if KV is shared beyond the first change of path where a layer has entries of only some of the tokens."""
    tokens = np.random.default_rng(1).integers(0, VOCAB_SIZE, 200).tolist()
    route = TokenRoute(ROUTER, TokenSchedule(12), 0.75, tokens, 50, shares_one_path=True)
    route.decide(51, tokens)
    assert route.uniform_length is None
    route.decide(60, tokens)
    route.decide(200, tokens)
    assert route.uniform_length == 50 + int(np.flatnonzero(route.choices != route.choices[0])[0])
    assert route.copy().uniform_length == route.uniform_length


def test_lowering_spends_less_from_a_position_on() -> None:
    """Fails if a rising load changes what was decided, or leaves the budget as it was."""
    tokens = np.random.default_rng(1).integers(0, VOCAB_SIZE, 400).tolist()
    route = TokenRoute(ROUTER, TokenSchedule(12), 1.0, tokens)
    before = depths_of(route, 100, tokens)
    assert not route.lower(5, 50, tokens)  # within what was decided
    assert not route.lower(3, 100, tokens)  # below the shallowest path
    assert route.lower(5, 100, tokens)
    depths = depths_of(route, 400, tokens)
    assert depths[:100] == before == [8] * 100
    assert np.mean(depths[100:]) <= 5.1
    assert route.uniform_length == 100
    assert route.lowered == [(100, 5)]
    with pytest.raises(ValueError, match="not less than 5"):
        route.lower(5, 400, tokens)


def test_seeing_tokens_together_is_seeing_them_one_by_one() -> None:
    """Fails if a batch of decisions differs from the same decisions alone, to the last bit of an estimate."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, VOCAB_SIZE, (5, 90)).tolist()
    alone = [TokenRoute(ROUTER, TokenSchedule(12), 0.75, row[:40]) for row in tokens]
    together = [TokenRoute(ROUTER, TokenSchedule(12), 0.75, row[:40]) for row in tokens]
    for route, row in zip([*alone, *together], [*tokens, *tokens]):
        route.decide(40, row)
    for position in range(40, 90):
        assert all(route.sees_next(row[: position + 1]) for route, row in zip(together, tokens))
        see_newest(together, [row[position] for row in tokens])
        for one, other, row in zip(alone, together, tokens):
            one.decide(position + 1, row)
            other.decide(position + 1, row)
            assert one._recent.mean.tolist() == other._recent.mean.tolist()
    assert [route.choices.tolist() for route in alone] == [route.choices.tolist() for route in together]


def test_positions_before_the_start_are_context_alone() -> None:
    """Fails if a prompt of one depth is charged to the account of the decoded tokens, or they do not see it."""
    tokens = np.random.default_rng(2).integers(0, VOCAB_SIZE, 60).tolist()
    route = TokenRoute(ROUTER, TokenSchedule(12), 0.75, tokens[:20], start=20)
    depths = [run.path.bit_count() for run in route.runs(20, 40, tokens) for _ in range(run.num_tokens)]
    assert (np.cumsum(depths) <= 6 * np.arange(1, 41) + 1e-3).all()

    def context_after(token: int) -> list[float]:
        route = TokenRoute(ROUTER, TokenSchedule(), 0.75, [token], start=1)
        route.decide(2, [token, 7])
        return route._recent.mean.tolist()

    assert context_after(3) != context_after(4)


def test_of_a_long_prompt_the_first_decision_reads_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the first token after a prompt of one depth costs a pass over all of it, or is decided otherwise."""
    tokens = np.random.default_rng(3).integers(0, VOCAB_SIZE, 340).tolist()

    def decoded() -> tuple[list[Any], int]:
        route, read = TokenRoute(ROUTER, TokenSchedule(12, 1), 0.75, tokens[:300], start=300), []
        excess_at = TokenRouter.excess_at
        with monkeypatch.context() as patched:
            patched.setattr(
                TokenRouter, "excess_at", lambda self, means, ids: read.append(len(ids)) or excess_at(self, means, ids)
            )
            return route.runs(300, 40, tokens), sum(read)

    runs, num_read = decoded()
    assert num_read <= 40 + ROUTER.horizon < 300
    monkeypatch.setattr(TokenRouter, "horizon", 300)
    assert decoded() == (runs, 339)


@pytest.mark.parametrize(
    ("paths", "problem"),
    [
        ((path_of([0, 1, 7]), path_of([0, 2, 3, 7]), full_path(8)), "subset"),
        ((path_of([0, 1, 2, 7]), full_path(8)), "depths"),
    ],
)
def test_paths_that_are_not_nested_or_not_the_grid_are_refused(paths: tuple[int, ...], problem: str) -> None:
    """Fails if a deep token lacks a layer that shallow ones run."""
    predictor = ROUTER.predictor
    grid = FoldedPredictor(predictor.decision, (3, 4, 8), 8) if problem == "subset" else predictor
    with pytest.raises(ValueError, match=problem):
        TokenRouter(grid, paths, ROUTER.prices)


def test_bad_schedules_and_budgets_are_refused() -> None:
    """Fails if an account could be overdrawn from the start."""
    with pytest.raises(ValueError, match="negative"):
        TokenSchedule(saved=-1)
    with pytest.raises(ValueError, match="shallowest"):
        TokenRoute(ROUTER, TokenSchedule(), 0.45, [1])
