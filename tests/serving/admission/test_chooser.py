"""Budget "auto": what the chooser takes, at the price of the moment."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.harness.engine import Tiny
from tests.harness.tiny_models import PREDICTOR_DEPTHS
from vllm_buddy.method import FoldedDecision, FoldedPredictor, budget_for_depth
from vllm_buddy.serving.admission.auto_limits import AutoLimits
from vllm_buddy.serving.admission.chooser import BudgetChooser, Terms
from vllm_buddy.serving.admission.latency import Latencies
from vllm_buddy.serving.admission.load import LoadPrice
from vllm_buddy.serving.admission.slo import Objectives
from vllm_buddy.serving.start.settings import BuddySettings


def chooser(load: LoadPrice | None = None, objectives: Objectives | None = None, **changes: Any) -> BudgetChooser:
    """Over depths 3, 4, 6, 8 of 8 whose excess, whatever the prompt, is 2.4, 1.2, 0.4 and 0 nats.

    A depth d costs excess + price * d / 8, so 8 is cheapest up to price 1.6, 6 up to 3.2, 4 up to 9.6.
    """
    gaps = np.array([1.2, 0.8, 0.4])
    b2 = np.log(np.expm1(gaps)).astype(np.float32)
    table = np.zeros((4, 1), np.float32)
    decision = FoldedDecision(table, table, np.zeros(1, np.float32), np.zeros((3, 1), np.float32), b2)
    usual = AutoLimits(8, PREDICTOR_DEPTHS, smallest=0.375, largest=1.0, price=1.0, load_price=None, load_floor=0.375)
    limits = replace(usual, **changes)
    return BudgetChooser(FoldedPredictor(decision, PREDICTOR_DEPTHS, 8), limits, load, objectives)


def choose(made: BudgetChooser, *asked: float) -> tuple[float, int, float]:
    """Budget, depth, and the price that decided."""
    found = made.choose(made._limits.budget(*asked), made.take_in([1]))
    return found.budget, found.depth, found.terms.price


def full_load(load_price: float) -> LoadPrice:
    load = LoadPrice(load_price)
    load.observe(100, 0, 0.0)
    return load


@pytest.mark.parametrize(("price", "depth"), [(0.0, 8), (1.5, 8), (1.7, 6), (3.1, 6), (3.3, 4), (9.5, 4), (9.7, 3)])
def test_the_depth_is_the_one_that_is_cheapest_at_the_price(price: float, depth: int) -> None:
    """Fails if the price is not per layers of the whole model, or the request's own price is not used."""
    assert choose(chooser(), price) == (budget_for_depth(depth, 8), depth, price)


def test_the_range_bounds_the_choice_and_the_budget_that_is_told() -> None:
    """Fails if a bound is passed over, or a budget is told that lies outside of the range which runs its depth."""
    assert choose(chooser(), 100.0, 0.5) == (0.5, 4, 100.0)
    # The budgets of fewest decimals of depths 4 and 6 are 0.5 and 0.8.
    assert choose(chooser(), 100.0, 0.55) == (0.55, 4, 100.0)
    assert choose(chooser(), 0.0, 0.375, 0.75) == (0.75, 6, 0.0)


def test_load_raises_the_price_of_the_server_and_of_requests() -> None:
    """Fails if a busy server chooses as an idle one, or load makes a high bid cheaper."""
    made = chooser(full_load(5.0))
    assert choose(made) == (0.5, 4, 5.0)
    assert choose(made, 2.0) == (0.5, 4, 5.0)
    assert choose(made, 50.0) == (0.4, 3, 50.0)
    assert (made.level, made.terms.price) == (1.0, 5.0)


def test_load_alone_does_not_go_below_its_floor() -> None:
    """Fails if load degrades answers further than the operator allows, or the floor lifts a cheap request."""
    made = chooser(full_load(50.0), load_floor=0.7)  # five layers; 6 is the first of the grid that is enough
    assert choose(made) == (0.8, 6, 50.0)
    assert choose(made, 2.0) == (0.8, 6, 50.0)
    assert choose(made, 4.0) == (0.5, 4, 50.0)  # would be 4 without load, too
    assert choose(made, 60.0) == (0.4, 3, 60.0)
    assert choose(made, 0.0, 0.375, 0.5) == (0.5, 4, 50.0)  # a range below the floor: its upper end


def test_objectives_lower_the_ceiling_as_far_as_the_level_asks() -> None:
    """Fails if a missed objective changes nothing, goes below the floor, or outlasts the work of the server."""
    made = chooser(objectives=Objectives({"ttft": 1.0}), load_floor=0.5)
    assert choose(made) == (1.0, 8, 1.0)
    made.observe_latencies(Latencies(0.0, wait_s=0.3), idle=False)
    assert 0 < made.level < 1
    assert choose(made) == (0.8, 6, 1.0)
    assert made.largest_budget == 0.8
    assert choose(made, 4.0) == (0.5, 4, 4.0)  # a bid of its own
    made.observe_latencies(Latencies(1.0, wait_s=5.0), idle=False)
    assert made.level == 1
    assert choose(made) == (0.5, 4, 1.0)
    assert choose(made, 50.0) == (0.4, 3, 50.0)
    assert choose(made, 0.0, 0.7, 1.0) == (0.8, 6, 0.0)  # the request's own range begins above it
    made.observe_latencies(Latencies(2.0), idle=True)
    assert (made.level, made.largest_budget) == (0.0, 1.0)
    assert choose(made) == (1.0, 8, 1.0)


def test_terms_are_harder_by_price_or_ceiling() -> None:
    """Fails if running requests are lowered though nothing got harder, or not when one of both did."""
    usual = Terms(1.0, 6)
    assert [Terms(1.0, 6).harder_than(usual), Terms(0.5, 8).harder_than(usual)] == [False, False]
    assert [Terms(1.1, 6).harder_than(usual), Terms(1.0, 4).harder_than(usual)] == [True, True]


def from_settings(tiny: Tiny, **buddy: Any) -> BudgetChooser:
    """The chooser of a server with these settings."""
    settings = BuddySettings(**buddy)
    limits = AutoLimits.from_settings(settings, tiny.artifact, 0.375)
    made = BudgetChooser.from_settings(settings, tiny.artifact, limits)
    assert made is not None
    return made


def test_the_hysteresis_of_load_is_the_one_that_was_set(tiny: Callable[[str], Tiny]) -> None:
    """Fails if load.hysteresis changes nothing."""
    levels = []
    for hysteresis in (0.0, 0.125, 0.25):
        made = from_settings(tiny("llama"), load={"price": 90.0, "waiting": (4, 12), "hysteresis": hysteresis})
        for num_waiting in (8, 6):
            made.observe(num_waiting, 0, 0.0)
        levels.append(made.level)
    assert levels == [0.25, 0.375, 0.5]


def test_hysteresis_and_headroom_of_objectives_are_those_that_were_set(tiny: Callable[[str], Tiny]) -> None:
    """Fails if slo.hysteresis or slo.headroom changes nothing, or one is taken for the other."""

    def levels(itl_ms: float, **slo: float) -> tuple[float, float]:
        """After a token that was late, and after one that came after itl_ms. The objective is 100."""
        made = from_settings(tiny("llama"), slo={"itl_ms": 100.0, **slo})
        found = []
        for now, seconds in enumerate((0.2, itl_ms / 1e3)):
            made.observe_latencies(Latencies(float(now), itls=Counter({seconds: 1})), idle=False)
            found.append(made.level)
        return found[0], found[1]

    def moves(itl_ms: float, **slo: float) -> int:
        late, then = levels(itl_ms, **slo)
        return (then > late) - (then < late)

    assert [moves(itl_ms, hysteresis=0.5, headroom=0.0) for itl_ms in (45, 55, 95, 105)] == [-1, 0, 0, 1]
    assert [moves(itl_ms, hysteresis=0.0, headroom=0.5) for itl_ms in (45, 55, 95, 105)] == [-1, 1, 1, 1]
