"""Costs of rows and draft passes, measured from the times of steps."""

from collections.abc import Callable

import numpy as np
import pytest

from vllm_buddy.serving.schedule.step_costs import EXPECTED_ROW, StepCosts


def observed(
    costs: StepCosts,
    cost: Callable[[int], float],
    passes: float = 1.0,
    num_rows: tuple[int, ...] = (1, 2, 3, 4, 5, 6),
    num_steps: int = 600,
    busy: float = 0.0,
) -> StepCosts:
    """After steps of so many rows with up to two passes of 0.3, whose times vary by 3%.

    cost: of a number of rows. busy: share of the steps that take a hundred times as long.
    """
    rng = np.random.default_rng(0)
    for _ in range(num_steps):
        rows, pass_costs = int(rng.choice(num_rows)), 0.3 * int(rng.integers(0, 3))
        seconds = 0.02 * (cost(rows) + passes * pass_costs) * rng.normal(1.0, 0.03)
        costs.observe(rows, pass_costs, seconds * (100.0 if rng.random() < busy else 1.0))
    return costs


def test_each_number_of_rows_has_its_cost() -> None:
    """Fails if two rows that take long make six look slow, which take no longer than one."""
    cost = {1: 1.0, 2: 1.16, 3: 0.97, 4: 0.97, 5: 0.98, 6: 1.02}.__getitem__
    for passes in (0.5, 1.0, 2.0):
        costs = observed(StepCosts(), cost, passes)
        for rows in range(2, 7):
            assert costs.step(rows) / costs.step(1) == pytest.approx(cost(rows), abs=0.05)
        assert costs.passes / costs.step(1) == pytest.approx(passes, rel=0.2)


@pytest.mark.parametrize("row", [0.0, 0.02, 0.2])
def test_the_cost_of_a_row_is_the_slope(row: float) -> None:
    """Fails if one row more in a batch is not what steps of more rows show."""
    costs = observed(StepCosts(), lambda n: 1.0 + row * (n - 1), num_rows=(8, 9, 11, 16, 30, 48))
    assert costs.row(8, 48) == pytest.approx(row / (1.0 + 7 * row), abs=0.006)


def test_what_was_never_seen_is_as_expected() -> None:
    """Fails if steps of one number of rows tell something about others."""
    costs = StepCosts()
    assert costs.row(8, 48) == pytest.approx(EXPECTED_ROW / (1.0 + 7 * EXPECTED_ROW))
    for _ in range(500):
        costs.observe(1, 0.0, 0.02)
    assert costs.step(6) / costs.step(1) == pytest.approx(1.0 + 5 * EXPECTED_ROW)
    assert costs.passes == 1.0


def test_a_host_that_was_busy_is_no_cost_of_drafts() -> None:
    """Fails if a few steps that took a hundred times as long keep drafts away."""
    costs = observed(StepCosts(), lambda _: 1.0, busy=0.01)
    assert max(costs.step(n) / costs.step(1) for n in range(2, 7)) < 1.3
    assert costs.passes < 2.0


@pytest.mark.parametrize("slow", [10.0, 100.0])
def test_a_slow_first_step_says_nothing_of_rows(slow: float) -> None:
    """Fails if a server whose first step waited for a compiler takes one row for much cheaper than several."""
    costs = StepCosts()
    for step in range(6):
        costs.observe(1, 0.0, 0.02 * (slow if step == 0 else 1.0))
    assert costs.step(5) / costs.step(1) == pytest.approx(1.0 + 4 * EXPECTED_ROW, rel=0.02)


def test_costs_that_change_are_found_again() -> None:
    """Fails if a server keeps what rows cost it in another hour."""
    costs = observed(observed(StepCosts(), lambda n: 1.0 + 0.3 * (n - 1), 2.0), lambda _: 5.0, num_steps=1500)
    assert costs.step(6) / costs.step(1) == pytest.approx(1.0, abs=0.05)


def test_costs_that_are_given_stay() -> None:
    """Fails if drafts.row_cost is overwritten."""
    costs = observed(StepCosts(0.1, measured=False), lambda _: 3.0, 2.0)
    assert (costs.step(3), costs.passes) == (1.2, 1.0)


def test_what_is_kept_is_bounded() -> None:
    """Fails if a long-lived server keeps an estimate for every number of rows that it ever had."""
    costs = StepCosts()
    for rows in range(1, 8193):
        costs.observe(rows, 0.0, 0.02)
    assert len(costs._steps) < 80
    assert [costs.step(n) == costs.step(n + 1) for n in range(1, 9)] == [False] * 8
