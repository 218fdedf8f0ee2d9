"""Tests of the running mean over a request's tokens."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.random_router import VOCAB_SIZE, random_decision
from vllm_buddy.method import Context

TABLE = random_decision().table_context
# float64 sums of float32 rows in another order; far below any gap between scores
MEAN_TOLERANCE = 1e-12

tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=200)


@given(tokens, st.data())
def test_mean_does_not_depend_on_chunks(token_ids: list[int], data: st.DataObject) -> None:
    """Fails if the mean depends on how tokens are added, so that a resumed request gets another path."""
    cut = data.draw(st.integers(0, len(token_ids)))
    whole, parts, single = Context(TABLE), Context(TABLE), Context(TABLE)
    whole.extend(token_ids)
    parts.extend(token_ids[:cut])
    parts.extend(token_ids[cut:])
    for token in token_ids:
        single.extend([token])
    for context in (parts, single):
        np.testing.assert_allclose(context.mean, whole.mean, rtol=0, atol=MEAN_TOLERANCE)
        assert (context.num_tokens, context.newest) == (len(token_ids), token_ids[-1])


def test_mean_is_the_mean_of_table_rows() -> None:
    """Fails if the mean leaves out the newest token, or the sum is not divided."""
    context = Context(TABLE)
    context.extend([3, 5, 3])
    np.testing.assert_allclose(context.mean, (2 * TABLE[3].astype(np.float64) + TABLE[5]) / 3, atol=MEAN_TOLERANCE)


def test_empty_chunk_changes_nothing() -> None:
    """Fails if a scheduler step without tokens for the request resets its newest token."""
    context = Context(TABLE)
    context.extend([9])
    context.extend([])
    assert (context.num_tokens, context.newest) == (1, 9)
