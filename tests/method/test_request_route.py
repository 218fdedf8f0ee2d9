"""Tests of when a request is routed again, and that its paths depend on its own tokens alone."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.random_router import NUM_LAYERS, VOCAB_SIZE, random_router
from vllm_buddy.method import LayerPath, PathSchedule, RequestRoute, Router, SplitRoute, full_path

ROUTER = random_router()
INTERVALS = (0, 1, 4, 16)

prompts = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30)
outputs = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=0, max_size=50)
long_outputs = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=20, max_size=50)


def _spread(route: RequestRoute, chunks: list[int], token_ids: list[int]) -> list[LayerPath]:
    """Return the path of every position if the request is scheduled in `chunks`; checks that runs cover each chunk."""
    paths: list[LayerPath] = []
    for num_tokens in chunks:
        runs = route.runs(len(paths), num_tokens, token_ids)
        assert sum(run.num_tokens for run in runs) == num_tokens
        assert all(run.num_tokens > 0 for run in runs)
        assert all(a.path != b.path for a, b in itertools.pairwise(runs))
        paths += [run.path for run in runs for _ in range(run.num_tokens)]
    return paths


def _expected(
    router: Router, schedule: PathSchedule, depth: int, token_ids: list[int], num_prompt: int
) -> list[LayerPath]:
    """Return the paths by definition: the decision of each position is computed from a new context."""
    paths = []
    for position in range(len(token_ids)):
        num_seen = num_prompt
        if schedule.interval and position >= num_prompt:
            decided_at = position - (position - num_prompt) % schedule.interval
            num_seen = max(num_prompt, decided_at - schedule.lag + 1)
        context = router.new_context()
        assert context is not None
        context.extend(token_ids[:num_seen])
        paths.append(router.path(context, depth))
    return paths


@st.composite
def chunks_of(draw: st.DrawFn, total: int) -> list[int]:
    """Draw a split of `total` positions into chunks."""
    cuts = sorted(draw(st.sets(st.integers(1, total - 1), max_size=12))) if total > 1 else []
    return [b - a for a, b in zip([0, *cuts], [*cuts, total])]


@given(prompts, outputs, st.sampled_from(INTERVALS), st.integers(0, 3), st.integers(3, NUM_LAYERS), st.data())
def test_paths_follow_the_definition_under_any_chunking(
    prompt: list[int], output: list[int], interval: int, lag: int, depth: int, data: st.DataObject
) -> None:
    """Fails if a path depends on how prefill is chunked or on the step in which a token is scheduled."""
    token_ids = prompt + output
    schedule = PathSchedule(interval, lag)
    chunks = data.draw(chunks_of(len(token_ids)))
    paths = _spread(RequestRoute(ROUTER, schedule, depth, prompt), chunks, token_ids)
    assert paths == _expected(ROUTER, schedule, depth, token_ids, len(prompt))
    assert {path.bit_count() for path in paths} == {depth}


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=2, max_size=40), st.sampled_from(INTERVALS), st.data())
def test_a_context_shorter_than_the_prompt_is_a_shorter_prompt(
    token_ids: list[int], interval: int, data: st.DataObject
) -> None:
    """Fails if the first path uses tokens after the context, or these are not routed like decoded tokens."""
    schedule = PathSchedule(interval, lag=data.draw(st.integers(0, 2)))
    num_context = data.draw(st.integers(1, len(token_ids)))
    num_prompt = data.draw(st.integers(num_context, len(token_ids)))
    route = RequestRoute(ROUTER, schedule, 5, token_ids[:num_prompt], num_context)
    paths = _spread(route, data.draw(chunks_of(len(token_ids))), token_ids)
    assert paths == _expected(ROUTER, schedule, 5, token_ids, num_context)


@pytest.mark.parametrize("num_context", [0, -1, 4])
def test_a_context_that_is_not_within_the_prompt_is_refused(num_context: int) -> None:
    """Fails if the first path may be decided without any token, or with tokens beyond the prompt."""
    with pytest.raises(ValueError, match=f"{num_context} context tokens of a prompt of 3"):
        RequestRoute(ROUTER, PathSchedule(4), 5, [1, 2, 3], num_context)


@given(prompts, outputs, st.sampled_from(INTERVALS), st.data())
def test_a_request_computed_again_runs_the_same_paths(
    prompt: list[int], output: list[int], interval: int, data: st.DataObject
) -> None:
    """Fails if a request that starts at position 0 again after a preemption gets other paths."""
    token_ids = prompt + output
    route = RequestRoute(ROUTER, PathSchedule(interval), 5, prompt)
    reached = data.draw(st.integers(0, len(token_ids)))
    before = _spread(route, [reached] if reached else [], token_ids)
    again = _spread(route, data.draw(chunks_of(len(token_ids))), token_ids)
    assert again[:reached] == before
    assert again == _expected(ROUTER, PathSchedule(interval), 5, token_ids, len(prompt))


@given(prompts, outputs, st.sampled_from((1, 4)), st.integers(0, 2))
def test_a_decision_never_sees_tokens_that_are_not_there_yet(
    prompt: list[int], output: list[int], interval: int, lag: int
) -> None:
    """Fails if the path of a token uses later tokens, which a decoding engine does not have yet."""
    token_ids = prompt + output
    route = RequestRoute(ROUTER, PathSchedule(interval, lag), 5, prompt)
    full = RequestRoute(ROUTER, PathSchedule(interval, lag), 5, prompt)
    for position in range(len(token_ids)):
        visible = token_ids[: max(len(prompt), position + 1 - lag)]
        assert route.runs(position, 1, visible) == full.runs(position, 1, token_ids)


def test_paths_really_change_along_a_request() -> None:
    """Fails if paths never change in these tests, so that they prove nothing, or the counters are wrong."""
    token_ids = [(7 * i) % VOCAB_SIZE for i in range(60)]
    route = RequestRoute(ROUTER, PathSchedule(1), 5, token_ids[:10])
    assert route.uniform_length is None
    assert route.num_decisions == 1
    paths = _spread(route, [60], token_ids)
    assert route.distinct_paths() == set(paths)
    assert len(set(paths)) > 3
    assert route.num_reroutes == sum(a != b for a, b in itertools.pairwise(paths))
    assert route.num_decisions == 51
    assert route.uniform_length is not None
    assert set(paths[: route.uniform_length]) == {paths[0]}
    assert paths[route.uniform_length] != paths[0]


@pytest.mark.parametrize("depth", [5, NUM_LAYERS])
def test_no_decisions_where_none_can_change_the_path(depth: int) -> None:
    """Fails if requests whose path cannot change (full depth, interval 0, no Decision Module) still make decisions."""
    prior_only = Router(NUM_LAYERS, ROUTER._bias)
    router, interval = (ROUTER, 1) if depth == NUM_LAYERS else (prior_only, 1)
    for route in (
        RequestRoute(router, PathSchedule(interval), depth, [1, 2]),
        RequestRoute(ROUTER, PathSchedule(0), depth, [1, 2]),
    ):
        _spread(route, [40], list(range(40)))
        assert (route.num_decisions, route.num_reroutes) == (1, 0)
        assert (route.first_path == full_path(NUM_LAYERS)) == (depth == NUM_LAYERS)


def test_a_change_after_the_prompt_counts_once_a_token_ran_there() -> None:
    """Fails if a path that no token ran is counted, or the change from the prompt's path to the next is not."""
    router, tokens = random_router(0), list(range(20))
    whole, decoded = (RequestRoute(router, PathSchedule(0), depth, tokens[:16]) for depth in (NUM_LAYERS, 4))
    route = SplitRoute(whole, decoded, 16)
    route.runs(0, 16, tokens[:16])
    assert (len(route.distinct_paths()), route.num_reroutes) == (1, 0)
    ahead = route.copy()
    ahead.decide(18, tokens)
    assert (len(ahead.distinct_paths()), ahead.num_reroutes) == (2, 1)
    assert (len(route.distinct_paths()), route.num_reroutes) == (1, 0)
    assert ahead.num_changes(15) == 1
    assert ahead.num_changes(16) == 0
    route.runs(10, 8, tokens)
    assert (len(route.distinct_paths()), route.num_reroutes) == (2, 1)


def test_a_request_that_is_lowered_right_after_its_prompt_changes_once() -> None:
    """Fails if the change after the prompt counts once as that and once as lowered."""
    router, tokens = random_router(0), list(range(20))
    whole, decoded = (RequestRoute(router, PathSchedule(0), depth, tokens[:16]) for depth in (NUM_LAYERS, 5))
    route = SplitRoute(whole, decoded, 16)
    route.runs(0, 16, tokens[:16])
    lower = next(depth for depth in (4, 3) if route.lower(depth, 16, tokens))
    route.runs(16, 4, tokens)
    assert (route.depth, route.num_reroutes, len(route.distinct_paths())) == (lower, 1, 2)


@pytest.mark.parametrize("schedule", [{"interval": -1}, {"lag": -1}])
def test_negative_settings_are_refused(schedule: dict[str, int]) -> None:
    """Fails if a negative interval, which makes the decision loop endless, or a negative lag is accepted."""
    with pytest.raises(ValueError, match="must not be negative"):
        PathSchedule(**schedule)


@given(prompts, long_outputs, st.sampled_from(INTERVALS), st.data())
def test_a_lowered_route_keeps_what_lies_before_and_runs_fewer_layers_behind(
    prompt: list[int], output: list[int], interval: int, data: st.DataObject
) -> None:
    """Fails if lowering the depth changes the paths of earlier positions, or has no effect on later ones."""
    token_ids = prompt + output
    position = data.draw(st.integers(len(prompt), len(token_ids) - 1))
    route = RequestRoute(ROUTER, PathSchedule(interval, 0), NUM_LAYERS, prompt)
    before = route.runs(0, position, token_ids)
    assert route.lower(5, position, token_ids)
    behind = route.runs(position, len(token_ids) - position, token_ids)
    assert [run.path for run in before] == [full_path(NUM_LAYERS)]
    assert {run.path.bit_count() for run in behind} == {5}
    assert behind[0].path == RequestRoute(ROUTER, PathSchedule(0), 5, prompt).first_path
    again = route.runs(0, len(token_ids), token_ids)  # after a preemption
    assert [run for run in again if run.path == full_path(NUM_LAYERS)] == [(position, full_path(NUM_LAYERS))]
    assert (route.uniform_length, route.depth, route.lowered) == (position, 5, [(position, 5)])


def test_lowering_takes_the_place_of_a_decision_for_the_same_token() -> None:
    """Fails if a decision that was made ahead, and has run nothing, leaves a run without tokens behind."""
    token_ids = list(range(20))
    route = RequestRoute(ROUTER, PathSchedule(1, 0), 6, token_ids[:4])
    changes = [p for p in range(5, 19) if route.runs(p - 1, 1, token_ids) != route.runs(p, 1, token_ids)]
    for position in changes:
        route = RequestRoute(ROUTER, PathSchedule(1, 0), 6, token_ids[:4])
        route.decide(position + 1, token_ids)
        if route.lower(4, position, token_ids):
            break
    else:
        raise AssertionError("no position of this request can be lowered")
    assert all(run.num_tokens > 0 for run in route.runs(0, 20, token_ids))
    assert [run.path.bit_count() for run in route.runs(position - 1, 2, token_ids)] == [6, 4]


def test_a_route_is_lowered_to_layers_of_its_path_only() -> None:
    """Fails if lowering the depth adds a layer that has no keys and values of the preceding tokens, or does nothing
    where the router's first choice has one and another path of the library has none."""
    inside, outside = 0b1000110001, 0b1010000011
    for library, lowered in (
        ({6: [0b1000111101], 4: [outside]}, False),
        ({6: [0b1000111101], 4: [outside, inside]}, True),
    ):
        router = random_router(library=library)
        route = RequestRoute(router, PathSchedule(0), 6, [1, 2, 3])
        assert route.lower(4, 3, [1, 2, 3]) == lowered
        assert (route.depth, route.lowered, route.num_reroutes) == ((4, [(3, 4)], 1) if lowered else (6, [], 0))
    assert route.runs(3, 1, [1, 2, 3, 4]) == [(1, inside)]
    with pytest.raises(ValueError, match="6 layers are not less than 4"):
        route.lower(6, 3, [1, 2, 3])


@given(prompts, st.integers(4, NUM_LAYERS - 1), st.data())
def test_without_a_library_a_route_can_always_be_lowered(prompt: list[int], depth: int, data: st.DataObject) -> None:
    """Fails if the best layers of the model are taken where the best of the route's own are asked for."""
    fewer = data.draw(st.integers(3, depth - 1))
    route = RequestRoute(ROUTER, PathSchedule(0), depth, prompt)
    assert route.lower(fewer, len(prompt), [*prompt, 1])
    (run,) = route.runs(len(prompt), 1, [*prompt, 1])
    assert run.path.bit_count() == fewer
    assert run.path & ~route.first_path == 0
