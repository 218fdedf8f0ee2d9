"""Tests of how much an answer is said to repeat itself."""

import pytest

pytest.importorskip("vllm")
from benchmarks.quality.answers import repeated


def test_repetition_is_the_share_of_runs_that_occurred_before() -> None:
    """Fails if a loop looks like an answer, or a short answer like a loop."""
    assert repeated([1, 2, 3]) == 0.0
    assert repeated(list(range(50))) == 0.0
    assert repeated([1, 2, 3, 4] * 25) == pytest.approx(1 - 4 / 97)
