"""Tests of converting raw importance to a prior."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_buddy.errors import CalibrationError
from vllm_buddy.importance import normalise
from vllm_buddy.method import layers_of, top_k_path

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


@given(values, st.booleans())
def test_result_is_a_permutation_of_ranks(raw: list[float], log_scale: bool) -> None:
    """Fails if equal or extreme values give equal priors, so that rounding decides the order of layers."""
    u = normalise(np.array(raw), log_scale=log_scale)
    num = len(raw)
    np.testing.assert_array_equal(np.sort(u), (np.arange(1, num + 1) / (num + 1)).astype(np.float32))


@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=60), st.booleans())
def test_more_important_never_ranks_lower_inside_the_clip(raw: list[int], log_scale: bool) -> None:
    """Fails if a step of the conversion reverses the order of two layers."""
    array = np.array(raw, dtype=np.float64)
    u = normalise(array, log_scale=log_scale)
    x = np.sign(array) * np.log1p(np.abs(array)) if log_scale else array
    q25, median, q75 = np.percentile(x, [25, 50, 75])
    inside = np.abs(x - median) < 3 * (q75 - q25)
    order = np.argsort(u[inside])
    assert (np.diff(x[inside][order]) >= 0).all()


def test_by_hand() -> None:
    """Fails if ranks start at 0 or are in reverse order."""
    found = normalise(np.array([10.0, 0.1, 5.0, 7.0]), log_scale=True)
    np.testing.assert_allclose(found, [0.8, 0.2, 0.4, 0.6])


def test_ties_go_to_the_lower_layer_like_the_routers() -> None:
    """Fails if the prior and the top-k break ties differently."""
    flat = np.full(5, 2.0)
    assert layers_of(top_k_path(normalise(flat, log_scale=False), 4)) == layers_of(top_k_path(flat, 4)) == [0, 1, 2, 6]


def test_outliers_beyond_the_clip_are_equal() -> None:
    """Fails if values are not clipped."""
    found = normalise(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 500.0, 1e6]), log_scale=False)
    assert found[7] > found[8] > found[6]


def test_values_that_are_not_finite_are_refused() -> None:
    """Fails if a perplexity that overflows is accepted, which makes every rank arbitrary."""
    with pytest.raises(CalibrationError, match="importance of layers 2, 4 is not a finite number"):
        normalise(np.array([1.0, np.inf, 2.0, np.nan]), log_scale=True)
