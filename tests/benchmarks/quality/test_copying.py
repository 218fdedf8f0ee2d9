"""Tests of how much an answer is said to copy."""

import pytest

pytest.importorskip("vllm")
from benchmarks.quality.copying import copied


def test_copied_is_the_share_of_runs_that_stand_in_the_prompt() -> None:
    """Fails if an answer that goes its own way counts as a copy, or the end of a copy as none."""
    prompt = list(range(100))
    assert copied(range(40, 90), prompt) == 1.0
    assert copied([*range(40, 50), *range(200, 210)], prompt) == pytest.approx(7 / 17)
    assert copied([5, 4, 3, 2, 1], prompt) == 0.0
    assert copied([1, 2], prompt) == 0.0
