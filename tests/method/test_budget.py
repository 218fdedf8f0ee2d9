"""Tests of converting a budget to a depth."""

import math

import numpy as np
import pytest

from vllm_buddy.errors import BudgetError
from vllm_buddy.method import budget_for_depth, depth_for_budget, parse_budget, runs_enough, smallest_budget


@pytest.mark.parametrize(
    ("budget", "num_layers", "depth"),
    [(1.0, 30, 30), (0.5, 30, 15), (0.9, 30, 27), (0.99, 30, 29), (0.1, 30, 3), (1.0, 3, 3), (0.999, 8, 7)],
)
def test_depth_is_the_floor_of_budget_times_layers(budget: float, num_layers: int, depth: int) -> None:
    """Fails if a budget is rounded to more layers than floor(budget * num_layers)."""
    assert depth_for_budget(budget, num_layers) == depth


def test_no_layer_is_lost_to_floating_point() -> None:
    """Fails if rounding errors lose a layer: 15/22 * 22 is 14.999... in floating point, so a bare floor gives 14."""
    assert math.floor(15 / 22 * 22) == 14
    for num_layers in range(3, 129):
        for depth in range(3, num_layers + 1):
            assert depth_for_budget(depth / num_layers, num_layers) == depth


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.0000001, 2.0, math.nan, math.inf, -math.inf])
def test_budget_outside_the_range_is_refused(budget: float) -> None:
    """Fails if a budget outside (0, 1] is accepted, or NaN, which passes the check `budget <= 0 or budget > 1`."""
    for check in (parse_budget, lambda b: depth_for_budget(b, 30)):
        with pytest.raises(BudgetError, match=r"allowed is a number in \(0, 1\]"):
            check(budget)


@pytest.mark.parametrize("value", [True, False, "0.5", "auto", [0.5], {"budget": 0.5}, None, 1 + 0j])
def test_budget_of_another_type_is_refused(value: object) -> None:
    """Fails if a value of another type is accepted. In Python True is an int, so it would mean full depth."""
    with pytest.raises(BudgetError) as raised:
        parse_budget(value)
    assert repr(value) in str(raised.value)


def test_numbers_are_taken_as_they_come() -> None:
    """Fails if a budget is refused for being the integer 1, as JSON writes it, or a numpy number."""
    assert parse_budget(1) == 1.0
    assert parse_budget(np.float64(0.25)) == 0.25


def test_too_low_a_budget_names_the_smallest() -> None:
    """Fails if a budget that leaves no middle layer is silently raised, or the error does not name the smallest one."""
    with pytest.raises(BudgetError, match=r"leaves 2 of 30 layers.*smallest allowed budget is 0\.1$"):
        depth_for_budget(0.0999, 30)


@pytest.mark.parametrize(
    ("depth", "num_layers", "budget"),
    [(15, 30, 0.5), (22, 30, 0.74), (26, 30, 0.87), (29, 30, 0.97), (3, 8, 0.4), (7, 8, 0.9), (125, 126, 0.993)],
)
def test_budget_for_a_depth_is_short(depth: int, num_layers: int, budget: float) -> None:
    """Fails if the budget in a printed command gives another depth, or has needless decimals (0.7333333333333333)."""
    assert budget_for_depth(depth, num_layers) == budget
    assert all(depth_for_budget(budget_for_depth(d, num_layers), num_layers) == d for d in range(3, num_layers + 1))


def test_the_layers_that_must_run_are_enough_at_any_budget_that_runs_them() -> None:
    """Fails if 3 of L layers are too few because the smallest budget is shown rounded."""
    for num_layers in range(3, 129):
        assert runs_enough(3 / num_layers, num_layers)
        assert not runs_enough(2.9 / num_layers, num_layers)


def test_smallest_budget_works_and_the_next_smaller_does_not() -> None:
    """Fails if the error message recommends a budget that is also refused, or one that is not the smallest."""
    for num_layers in range(3, 129):
        smallest = smallest_budget(num_layers)
        assert depth_for_budget(smallest, num_layers) >= 3
        with pytest.raises(BudgetError):
            depth_for_budget(smallest - 0.001, num_layers)
