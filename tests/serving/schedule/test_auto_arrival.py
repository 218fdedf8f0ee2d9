"""Budget "auto" in the scheduler, when a request arrives or starts again: what was chosen is what runs."""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.harness.auto_requests import (
    FEW_BLOCKS,
    LOAD_PRICE,
    PROMPTS,
    auto,
    both,
    chosen_depth,
    finish,
    fixed,
    outcome,
    pretend,
)
from tests.harness.engine import Ask, Tiny
from tests.harness.tiny_models import NUM_LAYERS, PREDICTOR_PRICE
from vllm_buddy.serving.admission.latency import Latencies, LatencyMeter


@both
@pytest.mark.parametrize("default", [False, True], ids=("asked", "default"))
def test_auto_is_the_explicit_budget_that_the_predictor_names(
    tiny: Callable[[str], Tiny], asynchronous: bool, default: bool
) -> None:
    """Fails if another depth runs than the predictor says, or "auto" runs other paths than the number it stands for.

    Half of the requests say a number, and share blocks of the prefix cache with the others.
    """
    made = pretend(tiny, asynchronous=asynchronous, default_budget="auto" if default else 1.0)
    depths = []
    for number, prompt in enumerate(PROMPTS * 2):
        ask = auto(prompt, 20, context=3 if number % 3 == 2 else None)
        depth = chosen_depth(tiny("llama"), ask)
        depths.append(depth)
        sent = replace(ask, options={}) if default else ask
        request_id = made.add(sent, runs_as=fixed(ask, depth))
        assert outcome(made, request_id) == (depth, PREDICTOR_PRICE)
        made.add(fixed(ask, depth))
        made.step()
    assert len(set(depths)) > 2
    finish(made)
    assert made.cache_hits > 0


@both
def test_a_preemption_does_not_ask_the_predictor_again(tiny: Callable[[str], Tiny], asynchronous: bool) -> None:
    """Fails if a request that starts again takes the price of that moment: its tokens so far ran at another depth."""
    made = pretend(
        tiny,
        asynchronous=asynchronous,
        num_blocks=FEW_BLOCKS,
        load={"price": LOAD_PRICE, "running": [1, 2]},
        auto={"price": 0.0},
    )
    first = made.add(auto(PROMPTS[0], 60), runs_as=fixed(auto(PROMPTS[0], 60), NUM_LAYERS))
    for prompt in PROMPTS[1:4]:
        made.add(Ask(prompt, 0.5, 60))
    for step in range(20):
        made.step()
        if step in (5, 12):
            assert made.scheduler._auto.chooser.level == 1
            made.preempt(0, drop_stale_output=False)
    assert made.scheduler.requests[first].num_preemptions > 0
    assert outcome(made, first) == (NUM_LAYERS, 0.0)
    finish(made)


@both
@pytest.mark.parametrize("signal", ["waiting", "running", "kv_use"])
def test_load_raises_the_price_and_it_falls_back(tiny: Callable[[str], Tiny], asynchronous: bool, signal: str) -> None:
    """Fails if a signal is not read from the scheduler, explicit budgets follow it, or the price stays up after it."""
    load: dict[str, Any] = {"price": LOAD_PRICE}
    load |= {"running": [1, 4]} if signal == "running" else {}
    if signal == "kv_use":
        load |= {"kv_use": [0.02, 0.04]}
    if signal != "waiting":
        load["waiting"] = [50, 60]
    made = pretend(tiny, asynchronous=asynchronous, load=load)
    calm = chosen_depth(tiny("llama"), auto(PROMPTS[0]))
    loaded = chosen_depth(tiny("llama"), auto(PROMPTS[0]), LOAD_PRICE)
    assert loaded < calm

    def send_auto() -> tuple[int, float | None]:
        request_id = made.add(auto(PROMPTS[0]))
        got = outcome(made, request_id)
        made.expect(request_id, fixed(auto(PROMPTS[0]), got[0]))
        return got

    assert send_auto() == (calm, PREDICTOR_PRICE)
    finish(made)
    explicit = [made.add(Ask(prompt, 1.0, 40)) for prompt in PROMPTS[1:10]]
    if signal != "waiting":
        for _ in range(25):
            made.step()
    assert send_auto() == (loaded, LOAD_PRICE)
    assert [outcome(made, request_id) for request_id in explicit] == [(NUM_LAYERS, None)] * 9
    finish(made)
    assert made.scheduler._auto.chooser.level == 0
    assert send_auto() == (calm, PREDICTOR_PRICE)
    finish(made)


@both
def test_an_abort_of_everything_leaves_no_load(tiny: Callable[[str], Tiny], asynchronous: bool) -> None:
    """Fails if the gauges of a server whose clients went away show their load for good: no request follows to tell."""
    from vllm.v1.request import RequestStatus

    made = pretend(tiny, asynchronous=asynchronous, load={"price": LOAD_PRICE, "running": [0, 2]})
    for prompt in PROMPTS[:4]:
        made.add(Ask(prompt, 0.5, 40))
    for _ in range(3):
        made.step()
    assert made.scheduler._auto.chooser.level == 1
    made.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    while not made.idle:
        made.step()
    assert made.scheduler._auto.chooser.level == 0


def test_a_request_with_a_salt_of_its_own_keeps_it_when_its_depth_changes(tiny: Callable[[str], Tiny]) -> None:
    """Fails if a depth that is chosen again drops the user's salt from the prefix cache, or adds to the old one."""
    made = pretend(tiny, asynchronous=False, slo={"ttft_ms": 100.0}, auto={"price": 0.0})
    scheduler = made.scheduler
    scheduler._auto.meter = LatencyMeter(itertools.count(time.perf_counter()).__next__)  # a second later at each look
    request_id = made.add(auto(PROMPTS[0], 4))
    request, routed = scheduler.requests[request_id], scheduler._routed[request_id]
    assert routed.route.depth == NUM_LAYERS
    request.cache_salt = "mine"
    scheduler._observe_load(idle=False)
    scheduler._choose_again_for_waiting()
    depth = routed.route.depth
    assert depth == routed.outcome.depth < NUM_LAYERS
    assert request.cache_salt == ("mine", f"{scheduler._salt_prefix}:{routed.route.cache_key}")
    scheduler._auto.chooser.observe_latencies(Latencies(1e6), idle=True)
    scheduler._choose_again_for_waiting()
    assert routed.route.depth == NUM_LAYERS
    assert request.cache_salt == "mine"
