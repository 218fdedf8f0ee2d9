"""Requests with budget "auto", and the pretend engine that serves them beside others."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.harness.engine import Ask, Tiny
from tests.harness.pretend_worker import PretendEngine
from tests.harness.tiny_models import NUM_LAYERS, PREDICTOR_DEPTHS, PREDICTOR_PRICE, random_prompts
from vllm_buddy.method import PathSchedule, budget_for_depth
from vllm_buddy.serving.admission.latency import LatencyMeter

PROMPTS = [tuple(p) for p in random_prompts(12, seed=81, min_tokens=3, max_tokens=90)]
LOAD_PRICE = 40.0
NUM_BLOCKS = 400
FEW_BLOCKS = 24


def auto(prompt: tuple[int, ...], max_tokens: int = 8, *, context: int | None = None, **options: Any) -> Ask:
    """A request with budget "auto". options: without the prefix of their names."""
    own = {"buddy_budget": "auto", **{f"buddy_{key}": value for key, value in options.items()}}
    return Ask(prompt, None, max_tokens, context=context, options=own)


def fixed(ask: Ask, depth: int) -> Ask:
    """The request that says as a number what was to be chosen for `ask`."""
    return replace(ask, budget=budget_for_depth(depth, NUM_LAYERS), options={})


def chosen_depth(
    tiny: Tiny, ask: Ask, price: float = PREDICTOR_PRICE, allowed: Sequence[int] = PREDICTOR_DEPTHS
) -> int:
    """What the predictor says, asked alone."""
    predictor = tiny.artifact.predictor
    assert predictor is not None
    return predictor.depth(predictor.excess(ask.prompt[: ask.context]), price, allowed)


def pretend(
    tiny: Callable[[str], Tiny], *, asynchronous: bool, num_blocks: int = NUM_BLOCKS, chunk: int = 33, **buddy: Any
) -> PretendEngine:
    return PretendEngine(
        tiny("llama"),
        PathSchedule(4, 1),
        asynchronous=asynchronous,
        num_blocks=num_blocks,
        chunk=chunk,
        # Most tests are about arriving requests.
        buddy={**buddy, "load": {"lowers_running": False, **buddy["load"]}} if "load" in buddy else buddy,
    )


def outcome(engine: PretendEngine, request_id: str) -> tuple[int, float | None]:
    """Depth and price of an unfinished request."""
    found = engine.scheduler._routed[request_id].outcome
    return found.depth, found.price


def step_until(engine: PretendEngine, done: Callable[[], bool]) -> None:
    """Step until `done`, at most some thousand times."""
    for _ in range(3000):
        if done():
            return
        engine.step()
    raise AssertionError("it does not happen")


def finish(engine: PretendEngine) -> None:
    """Serve what there is; every request must get what it gets alone, at the budget it is said to run at."""
    while not engine.idle:
        engine.step()
    for request_id, ask in engine.asks.items():
        assert engine.generated[request_id] == engine.expected(ask)


both = pytest.mark.parametrize("asynchronous", [False, True], ids=("sync", "async"))
layouts = pytest.mark.parametrize("layout", ["dense", "units"])


def pace(made: PretendEngine, layer_s: float) -> None:
    """Let the clock of latencies go on by a time for each layer of the deepest request of a step."""
    scheduler, now, schedule = made.scheduler, [time.perf_counter()], made.scheduler.schedule
    scheduler._auto.meter = LatencyMeter(lambda: now[0])

    def paced() -> Any:
        output = schedule()
        routes = {req_id: routed.route for req_id, routed in scheduler._routed.items()}
        for new in output.scheduled_new_reqs:  # the depth of "auto" is the one of this moment
            if made.asks[new.req_id].options:
                made.expect(new.req_id, fixed(made.asks[new.req_id], routes[new.req_id].depth))
        now[0] += layer_s * max((routes[req_id].depth for req_id in output.num_scheduled_tokens), default=0)
        return output

    scheduler.schedule = paced
