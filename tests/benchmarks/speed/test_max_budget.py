"""Tests what the benchmark of `max_budget` makes of its measurements. No engine is started."""

import pytest

from benchmarks.speed.max_budget import check_tokens, figures


def test_kv_tokens_are_those_that_fit_beside_the_weights() -> None:
    """Fails if the memory of the weights is counted twice, or not at all."""
    assert figures(256 << 20, 40_000) == {"weights_mib": 256.0, "kv_tokens_per_gib": 40_000, "kv_tokens": 30_000}


def test_other_tokens_end_the_benchmark() -> None:
    """Fails if figures of a server that gives wrong answers are written."""
    right: dict[str, list[list[int]]] = {"1.0": [[1]], "0.5": [[2]]}
    check_tokens({1.0: right, 0.5: {"0.5": [[2]]}})
    with pytest.raises(SystemExit, match=r"max_budget 0\.5 gives other tokens at budget 0\.5"):
        check_tokens({1.0: right, 0.5: {"0.5": [[3]]}})
