"""The figures of the speculation benchmark."""

from typing import Any

import pytest

from benchmarks.harness import engines
from benchmarks.harness.engines import DecodeRun
from benchmarks.speed import speculation


def test_speed_counts_all_tokens_after_the_first_over_all_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if prompts count, a text that is copied fast takes as much time as one that is not, or drafts are lost."""
    runs = {
        # Nine tokens in 4 steps of 10 ms: 8 of them in the 30 ms after the first.
        "fast": DecodeRun([10.0] * 4, [], [list(range(9))], [[0, 1, 2, 3]]),
        # Two requests after a prompt of 500 ms: two more tokens in 2 steps of 20 ms, and one in the first of these.
        "slow": DecodeRun([500.0, 20.0, 20.0], [], [[1, 2, 3], [1, 2]], [[0, 1, 2], [0, 1]]),
    }
    monkeypatch.setattr(engines, "decode", lambda _variant, prompts, _num_tokens: runs[prompts[0]])
    variant: Any = None
    groups: Any = [["fast"], ["slow", "slow"]]
    figures = speculation._timed(variant, groups)
    assert figures["tokens_per_s"] == pytest.approx((8 + 2 + 1) / (0.030 + 0.040))
    assert figures["accepted_per_step"] == pytest.approx(((8 / 3 - 1) + 0 + 0) / 3)
