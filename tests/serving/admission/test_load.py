"""The load as a level, and the price under it."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_buddy.serving.admission.load import LoadPrice

numbers = st.integers(0, 20)
shares = st.floats(0, 1)
states = st.lists(st.tuples(numbers, numbers, shares), min_size=1, max_size=30)
hystereses = st.floats(0, 0.99)


def levels(load: LoadPrice, waiting: Sequence[int]) -> list[float]:
    return [load.observe(num, 0, 0.0) for num in waiting]


def test_each_signal_raises_the_level_along_its_own_line() -> None:
    """Fails if a signal is read on another's line, or does not end at exactly 1."""
    load = LoadPrice(1.0, waiting=(2, 6), running=(10, 20), kv_use=(0.5, 0.75), hysteresis=0.0)
    assert levels(load, (0, 2, 3, 4, 6, 60, 0)) == [0, 0, 0.25, 0.5, 1, 1, 0]
    assert [load.observe(0, num, 0.0) for num in (10, 15, 20, 500)] == [0, 0.5, 1, 1]
    assert [load.observe(0, 0, use) for use in (0.5, 0.625, 0.75, 1.0)] == [0, 0.5, 1, 1]
    assert load.observe(3, 15, 0.5) == 0.5  # the largest


def test_running_requests_count_only_where_they_are_asked_to() -> None:
    """Fails if a server with many running and no waiting requests becomes dearer by itself."""
    assert LoadPrice(1.0).observe(0, 1000, 0.0) == 0


def test_the_level_falls_on_a_lower_line_than_it_rose() -> None:
    """Fails if a load that wavers moves the price up and down, or if the level stays where the load has gone.

    Signal from 4 to 12 with hysteresis 0.25: it falls on the line from 2 to 10.
    """
    load = LoadPrice(1.0, waiting=(4, 12), hysteresis=0.25)
    assert levels(load, (8, 7, 8, 6, 8)) == [0.5] * 5
    assert levels(load, (5, 4, 3, 2)) == [0.375, 0.25, 0.125, 0]
    assert levels(load, (4, 12, 10, 9)) == [0, 1, 1, 0.875]


@given(states, hystereses)
def test_a_server_without_work_is_at_level_0(past: list[tuple[int, int, float]], hysteresis: float) -> None:
    """Fails if the price stays up on an idle server: with low = 1 the lowered line could end below 0 requests."""
    load = LoadPrice(1.0, waiting=(1, 8), running=(0, 3), hysteresis=hysteresis)
    for state in past:
        load.observe(*state)
    assert load.observe(0, 0, 0.0) == 0
    assert load.price(0.1) == 0.1


@given(states, hystereses)
def test_the_level_is_never_below_the_load_and_never_above_what_was(
    states: list[tuple[int, int, float]], hysteresis: float
) -> None:
    """Fails if hysteresis delays a rise, or lets the level grow while the load falls."""
    memoryless = LoadPrice(1.0, running=(2, 9), hysteresis=0.0)
    load = LoadPrice(1.0, running=(2, 9), hysteresis=hysteresis)
    before = 0.0
    for state in states:
        present = memoryless.observe(*state)
        level = load.observe(*state)
        assert 0 <= present <= level <= max(before, present) <= 1
        before = level


def test_the_price_goes_from_the_base_to_the_load_price() -> None:
    """Fails if a price between the two is off, or the ends are not met exactly."""
    load = LoadPrice(0.7, waiting=(0, 4), hysteresis=0.0)
    for waiting, price in ((0, 0.1), (1, 0.25), (2, 0.4), (4, 0.7)):
        load.observe(waiting, 0, 0.0)
        assert load.price(0.1) == pytest.approx(price, abs=1e-12)
    assert load.price(0.1) == 0.7


def test_load_never_lowers_a_price() -> None:
    """Fails if a request that bids more than the load price is served deeper because the server is busy."""
    load = LoadPrice(0.5)
    load.observe(100, 0, 0.0)
    assert load.price(0.8) == 0.8
