"""Tests of adding the prior to the scores and choosing a path."""

import numpy as np
import pytest

from tests.harness.random_router import NUM_LAYERS, random_decision, random_router
from vllm_buddy.method import Context, Router, layers_of, path_of, top_k_path

PRIOR = np.array([0.1, 0.9, 0.4, 0.4, 0.8, 0.2, 0.3, 0.7])


def _context(router: Router, token_ids: list[int]) -> Context:
    context = router.new_context()
    assert context is not None
    context.extend(token_ids)
    return context


def test_prior_alone_gives_one_path_per_depth() -> None:
    """Fails if a router without a Decision Module keeps the least important layers."""
    router = Router(NUM_LAYERS, PRIOR)
    assert router.new_context() is None
    assert layers_of(router.path(None, 5)) == [0, 2, 5, 8, 9]
    assert layers_of(router.path(None, 6)) == [0, 2, 3, 5, 8, 9]


def test_prior_is_standardised_and_weighted() -> None:
    """Fails if the scale of the prior (log perplexities, ranks) changes its weight against the trained scores."""
    decision = random_decision()
    router, scaled = Router(NUM_LAYERS, PRIOR, decision), Router(NUM_LAYERS, 1000 * PRIOR + 5, decision)
    for token_ids in ([1], [2, 3], [4, 5, 6]):
        context = _context(router, token_ids)
        fused = decision.scores(context) + 0.1 * (PRIOR - PRIOR.mean()) / PRIOR.std()
        for depth in range(3, NUM_LAYERS):
            assert router.path(context, depth) == top_k_path(fused, depth) == scaled.path(context, depth)


@pytest.mark.parametrize("num_layers", [63, 64, 65, 128])
def test_models_of_any_depth_have_paths_to_choose_from(num_layers: int) -> None:
    """Fails if a path of more layers than a machine word has bits cannot be served."""
    layers = [0, *range(3, num_layers)]
    library = {num_layers - 2: [path_of(np.array(layers))]}
    router = Router(num_layers, np.arange(num_layers - 2.0), library=library)
    assert layers_of(router.path(None, num_layers - 2)) == layers


def test_flat_prior_leaves_the_scores_alone() -> None:
    """Fails if standardising a constant prior divides by zero, and NaN scores choose the path."""
    decision = random_decision()
    router = Router(NUM_LAYERS, np.full(NUM_LAYERS - 2, 3.0), decision)
    context = _context(router, [1, 2])
    assert router.path(context, 5) == top_k_path(decision.scores(context), 5)


@pytest.mark.parametrize("library", [None, {5: [path_of([0, 1, 2, 3, 9])]}])
def test_full_depth_is_never_routed(library: dict[int, list[int]] | None) -> None:
    """Fails if a request at budget 1.0 is looked up in a library, which has no full path."""
    router = random_router(library=library)
    assert router.path(None, NUM_LAYERS) == (1 << NUM_LAYERS) - 1


def test_library_path_with_the_highest_sum_wins() -> None:
    """Fails if library paths are not compared by the sum of their layers' scores."""
    rng = np.random.default_rng(4)
    paths = [path_of([0, *rng.choice(np.arange(1, 9), 3, replace=False).tolist(), 9]) for _ in range(6)]
    router, free = random_router(library={5: paths}), random_router()
    picked = set()
    for token in range(40):
        context = _context(router, [token])
        scores = free.decision.scores(context) + free._bias
        wanted = max(paths, key=lambda path: sum(scores[layer - 1] for layer in layers_of(path)[1:-1]))
        assert router.path(context, 5) == wanted
        picked.add(wanted)
    assert len(picked) > 2


def test_library_ties_go_to_the_first_path() -> None:
    """Fails if the choice among equal library paths is not deterministic."""
    paths = [path_of([0, 3, 9]), path_of([0, 1, 9])]
    assert Router(NUM_LAYERS, np.zeros(8), library={3: paths}).path(None, 3) == paths[0]


def test_reachable_layers_are_those_of_all_paths() -> None:
    """Fails if a layer that some input would run is left out, or one that none would is kept."""
    library = {4: [path_of([0, 1, 2, 9]), path_of([0, 2, 7, 9])], 6: [path_of([0, 1, 3, 4, 5, 9])]}
    for decision in (None, random_decision()):
        router = Router(NUM_LAYERS, PRIOR, decision, library=library)
        assert layers_of(router.reachable(range(3, 6))) == [0, 1, 2, 7, 9]
        assert layers_of(router.reachable([4, 6])) == [0, 1, 2, 3, 4, 5, 7, 9]
        assert router.reachable([4, NUM_LAYERS]) == router.full
    # Without a library a Decision Module may choose any layers, and a prior alone takes the same ones every time.
    assert Router(NUM_LAYERS, PRIOR, random_decision()).reachable([4]) == (1 << NUM_LAYERS) - 1
    assert layers_of(Router(NUM_LAYERS, PRIOR).reachable(range(3, 7))) == [0, 2, 3, 5, 8, 9]


def test_depths_of_the_library_are_listed() -> None:
    """Fails if the router lists a depth for which its library has no path, or misses one."""
    router = random_router(library={7: [path_of(range(7))], 5: [path_of([0, 1, 2, 3, 9])]})
    assert router.depths == [5, 7]
    assert random_router().depths is None
