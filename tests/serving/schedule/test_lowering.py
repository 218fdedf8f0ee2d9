"""Load and missed objectives lower requests with budget "auto" that run or wait, and nobody else."""

from collections.abc import Callable

import pytest

from tests.harness.auto_requests import (
    LOAD_PRICE,
    PROMPTS,
    auto,
    both,
    fixed,
    layouts,
    outcome,
    pace,
    pretend,
    step_until,
)
from tests.harness.engine import Ask, Tiny
from tests.harness.tiny_models import NUM_LAYERS, PREDICTOR_DEPTHS


@both
@layouts
def test_a_rising_load_lowers_requests_that_run(tiny: Callable[[str], Tiny], asynchronous: bool, layout: str) -> None:
    """Fails if requests of a calm minute stay deep in a busy one, numbers are touched, or a block that holds tokens of
    the lower depth is found by one who runs the depth before."""
    made = pretend(
        tiny,
        asynchronous=asynchronous,
        load={"price": LOAD_PRICE, "running": [2, 4], "lowers_running": True},
        auto={"price": 0.0},
        kv_layout=layout,
    )
    scheduler = made.scheduler
    first = made.add(auto(PROMPTS[0], 60), runs_as=fixed(auto(PROMPTS[0], 60), NUM_LAYERS))
    number = made.add(Ask(PROMPTS[1], 1.0, 60))
    for _ in range(25):
        made.step()
    route = scheduler._routed[first].route
    assert not route.lowered
    assert route.depth == NUM_LAYERS
    others = [made.add(Ask(prompt, 0.5, 30)) for prompt in PROMPTS[2:6]]
    for _ in range(6):
        made.step()
    assert [depth for _, depth in route.lowered][-1:] == [PREDICTOR_DEPTHS[0]]
    assert all(len(PROMPTS[0]) < position for position, _ in route.lowered)
    assert not scheduler._routed[number].route.lowered
    told = scheduler._routed[first].outcome.as_dict(route)
    assert (told["depth"], told["lowered_to"]) == (NUM_LAYERS, PREDICTOR_DEPTHS[0])
    made.preempt(0, drop_stale_output=False)
    while not made.idle:
        made.step()
    for request_id in (number, *others):
        assert made.generated[request_id] == made.expected(made.asks[request_id])
    follow_up = made.add(Ask((*PROMPTS[0], *made.generated[first]), 1.0, 4))
    while not made.idle:
        made.step()
    assert made.generated[follow_up] == made.expected(made.asks[follow_up])


@both
@layouts
def test_a_request_that_is_computed_again_is_lowered_once_it_is_done(
    tiny: Callable[[str], Tiny], asynchronous: bool, layout: str
) -> None:
    """Fails if a rising load lowers a request between two chunks of tokens that it has generated before a preemption:
    they ran at its old depth, and positions would be out of order."""
    load = {"price": LOAD_PRICE, "running": [1, 3], "waiting": [0, 2], "lowers_running": True}
    made = pretend(tiny, asynchronous=asynchronous, chunk=16, load=load, auto={"price": 0.0}, kv_layout=layout)
    prompt, others = PROMPTS[0], PROMPTS[1:5]
    first = made.add(auto(prompt, 120), runs_as=fixed(auto(prompt, 120), NUM_LAYERS))
    step_until(made, lambda: len(made.generated[first]) >= 60)
    made.scheduler.reset_prefix_cache(reset_running_requests=True)
    request, route = made.scheduler.requests[first], made.scheduler._routed[first].route
    step_until(made, lambda: len(prompt) < request.num_computed_tokens < len(prompt) + 50)
    for other in others:
        made.add(Ask(other[:3], 0.5, 100))
    step_until(made, lambda: bool(route.lowered))
    assert route.lowered[0][0] >= len(prompt) + 59
    step_until(made, lambda: made.idle)
    assert len(made.generated[first]) == 120


def test_a_request_that_is_computed_again_is_not_lowered_where_accepted_drafts_ran(
    tiny: Callable[[str], Tiny],
) -> None:
    """Fails if the engine ends, or tokens of which a client has been told paths run others: accepted drafts are not
    among the tokens that were planned."""
    made = pretend(tiny, asynchronous=False, slo={"itl_ms": 1e6}, auto={"price": 0.0})
    first = made.add(auto(PROMPTS[0], 60), runs_as=fixed(auto(PROMPTS[0], 60), NUM_LAYERS))
    step_until(made, lambda: len(made.generated[first]) >= 20)
    request, routed = made.scheduler.requests[first], made.scheduler._routed[first]

    def lowered_to(ceiling: int) -> list[tuple[int, int]]:
        made.scheduler._auto.chooser._ceiling.depth = ceiling
        made.scheduler._auto.lower([(request, routed)])
        return routed.route.lowered

    position, before = request.num_computed_tokens, [*lowered_to(PREDICTOR_DEPTHS[1])]
    assert before == [(position, PREDICTOR_DEPTHS[1])]
    routed.planned, request.num_computed_tokens = position - 4, position - 2  # computed again, as far as this
    assert lowered_to(PREDICTOR_DEPTHS[0]) == before
    request.num_computed_tokens = position
    assert lowered_to(PREDICTOR_DEPTHS[0])[-1] == (position, PREDICTOR_DEPTHS[0])


@both
@layouts
def test_a_missed_objective_lowers_what_runs_and_what_waits(
    tiny: Callable[[str], Tiny], asynchronous: bool, layout: str
) -> None:
    """Fails if latencies are measured wrongly, a request that waited runs the depth of the calm before, numbers are
    touched, or a block is found that another path made."""
    made = pretend(tiny, asynchronous=asynchronous, slo={"itl_ms": 25.0}, auto={"price": 0.0}, kv_layout=layout)
    scheduler = made.scheduler
    pace(made, layer_s=0.01)  # the fewest layers take 30 ms
    scheduler.max_num_running_reqs = scheduler.max_num_active_reqs = 6
    autos = [made.add(auto(prompt, 60)) for prompt in PROMPTS[:9]]
    number = made.add(Ask(PROMPTS[9], 0.5, 60))
    calm = {request_id: outcome(made, request_id) for request_id in autos}
    assert set(calm.values()) == {(NUM_LAYERS, 0.0)}
    step_until(made, lambda: scheduler._auto.chooser.level == 1)
    running = [request.request_id for request in scheduler.running if request.request_id in autos]
    assert 0 < len(running) < len(autos)
    routes = [scheduler._routed[request_id].route for request_id in running]
    step_until(made, lambda: all(route.depth == PREDICTOR_DEPTHS[0] for route in routes))
    assert routes[0].lowered
    depths: dict[str, int] = {}
    while not made.idle:
        depths |= {request_id: outcome(made, request_id)[0] for request_id in autos if request_id in scheduler._routed}
        made.step()
    assert depths[running[0]] == NUM_LAYERS
    assert all(depths[request_id] == PREDICTOR_DEPTHS[0] for request_id in autos if request_id not in running)
    assert all(len(tokens) == 60 for tokens in made.generated.values())
    assert made.generated[number] == made.expected(made.asks[number])
    assert scheduler._auto.chooser.objectives.observed_s["itl"] == pytest.approx(0.08)
    assert scheduler._auto.chooser.level == 0
    assert scheduler._auto.chooser.terms == (0, NUM_LAYERS)
