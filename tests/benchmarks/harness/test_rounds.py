"""Tests that a benchmark shows no figures of what was not checked or did not finish."""

import numpy as np
import pytest

from benchmarks.harness.rounds import Refused, Rounds


def _filled(num_rounds: int = 3) -> Rounds:
    rounds = Rounds(num_rounds)
    rounds.mark_checked(["stock", "buddy"])
    for index in range(num_rounds):
        rounds.add(index, "stock", ms=10.0 * (index + 1))
        rounds.add(index, "buddy", ms=5.0 * (index + 1))
    return rounds


def test_ratios_are_taken_within_a_round() -> None:
    """Fails if a ratio mixes rounds: the machine's speed differs between them, and the ratio must not depend on it."""
    np.testing.assert_allclose(_filled().ratio("ms", "buddy", "stock"), [0.5, 0.5, 0.5])


def test_unchecked_output_gives_no_figure() -> None:
    """Fails if a variant whose outputs were not compared can be reported."""
    rounds = _filled()
    for index in range(3):
        rounds.add(index, "new", ms=1.0)
    with pytest.raises(Refused, match="'new' computes was not checked"):
        rounds.values("ms", "new")
    with pytest.raises(Refused, match="'new' computes was not checked"):
        rounds.ratio("ms", "stock", "new")


def test_missing_round_gives_no_figure() -> None:
    """Fails if fewer runs than asked are averaged as if they were all."""
    rounds = _filled()
    del rounds._values["buddy", "ms"][1]
    with pytest.raises(Refused, match="'buddy' finished 2 of 3 rounds"):
        rounds.ratio("ms", "buddy", "stock")
    with pytest.raises(Refused, match="'buddy' finished 0 of 3 rounds"):
        rounds.values("tokens_per_s", "buddy")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_gives_no_figure(value: float) -> None:
    """Fails if a run that measured nothing ends up in a percentile."""
    rounds = _filled()
    rounds.add(1, "buddy", ms=value)
    with pytest.raises(Refused, match="not a number in every round"):
        rounds.values("ms", "buddy")


def test_no_ratio_to_zero() -> None:
    """Fails if a peer that did nothing makes the ratio infinite."""
    rounds = _filled()
    rounds.add(0, "stock", ms=0.0)
    with pytest.raises(Refused, match="'stock' is 0 in a round"):
        rounds.ratio("ms", "buddy", "stock")


def test_rows_carry_spread_and_count() -> None:
    """Fails if a results row loses the number of rounds or the spread over them."""
    rounds = _filled(5)
    row = rounds.row("ms", rounds.values("ms", "stock"), variant="stock")
    assert row == {"metric": "ms", "variant": "stock", "p20": 18.0, "p50": 30.0, "p80": 42.0, "n": 5}


def test_rounds_are_needed() -> None:
    """Fails if --rounds 0 ends in an empty percentile instead of a reason."""
    with pytest.raises(Refused, match="at least 1"):
        Rounds(0)
