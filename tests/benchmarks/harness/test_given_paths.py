"""Tests benchmarks on given paths: how paths are drawn, and which request gets which path."""

import numpy as np
import pytest
import torch

from benchmarks.harness.given_paths import GivenPaths, draw_paths, union_of
from tests.harness.tiny_models import NUM_LAYERS, VOCAB_SIZE
from vllm_buddy.method import DecisionModule, FoldedDecision, PathSchedule, RequestRoute, Router, layers_of

DEPTH = 4


def _rng() -> np.random.Generator:
    return np.random.default_rng(1)


@pytest.mark.parametrize(
    ("num_paths", "union"), [(1, None), (1, 15), (2, None), (2, 22), (8, 18), (32, None), (32, 17), (32, 30)]
)
def test_drawn_paths_are_what_was_asked_for(num_paths: int, union: int | None) -> None:
    """Fails if a batch has fewer paths, other depths or another union than its row says."""
    paths = draw_paths(_rng(), num_paths, 15, 30, union)
    assert len(set(paths)) == len(paths) == num_paths
    for path in paths:
        layers = layers_of(path)
        assert (len(layers), layers[0], layers[-1]) == (15, 0, 29)
    covered = {layer for path in paths for layer in layers_of(path)}
    assert layers_of(union_of(paths)) == sorted(covered)
    assert union is None or len(covered) == union


def test_the_same_seed_draws_the_same_paths() -> None:
    """Fails if two runs of a benchmark time different batches under one name."""
    assert draw_paths(_rng(), 8, 15, 30, 20) == draw_paths(_rng(), 8, 15, 30, 20)
    assert draw_paths(_rng(), 8, 15, 30) != draw_paths(np.random.default_rng(2), 8, 15, 30)


def test_paths_are_plain_integers() -> None:
    """Fails if a path is held in numpy's 64-bit integers, which lose layers of models that have more than 64."""
    assert layers_of(draw_paths(_rng(), 1, 100, 100)[0]) == list(range(100))


@pytest.mark.parametrize(("num_paths", "union"), [(2, 15), (2, 29), (10_000_000_000, None)])
def test_paths_that_do_not_exist_are_an_error(num_paths: int, union: int | None) -> None:
    """Fails if the search never ends: two distinct paths in the layers of one, or a union that paths cannot reach."""
    with pytest.raises(ValueError, match="found no"):
        draw_paths(_rng(), num_paths, 15, 30, union)


@pytest.fixture
def router() -> GivenPaths:
    module = DecisionModule(value_dim=4, num_middle=NUM_LAYERS - 2)
    values = np.random.default_rng(0).normal(size=(VOCAB_SIZE, 4)).astype(np.float32)
    decision = FoldedDecision.fold(module, torch.from_numpy(values))
    asked = Router(NUM_LAYERS, np.arange(NUM_LAYERS - 2.0), decision)
    return GivenPaths(asked, draw_paths(_rng(), 3, DEPTH, NUM_LAYERS), first_token=50)


def test_requests_get_their_paths_by_the_first_token_for_good(router: GivenPaths) -> None:
    """Fails if a path depends on decoded tokens or on when it is asked for: the reference would check another path."""
    schedule = PathSchedule(interval=2)
    for i in range(7):
        prompt = [50 + i, 3, 400]
        token_ids = [*prompt, 60, 51, 52, 50]
        for _ in range(2):
            route = RequestRoute(router, schedule, DEPTH, prompt)
            (run,) = route.runs(0, len(token_ids), token_ids)
            assert run.path == router.paths[i % 3]
            assert route.num_decisions == 3


def test_the_decision_module_is_asked_all_the_same(router: GivenPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the router costs nothing in a benchmark that measures the cost of routing."""
    asked = []
    scores = FoldedDecision.scores
    monkeypatch.setattr(FoldedDecision, "scores", lambda *args: asked.append(args) or scores(*args))
    RequestRoute(router, PathSchedule(), DEPTH, [50, 1])
    assert len(asked) == 1


def test_full_depth_and_a_depth_that_was_not_given(router: GivenPaths) -> None:
    """Fails if a path has another depth than the request's budget."""
    assert RequestRoute(router, PathSchedule(), NUM_LAYERS, [50]).first_path == router.full
    with pytest.raises(ValueError, match="5 layers is asked for, those given have 4"):
        RequestRoute(router, PathSchedule(), 5, [50])
