"""Cutting a text into windows."""

import pytest

from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation.windows import text_samples


def test_every_token_behind_the_first_context_is_scored_once() -> None:
    """Fails if tokens at the borders of windows are left out or counted twice."""
    samples = text_samples(range(100), window=20, stride=15, context=5)
    assert [target for sample in samples for target in sample.targets] == list(range(5, 95))
    assert all(len(sample.token_ids) == 20 for sample in samples)


def test_a_larger_stride_leaves_gaps() -> None:
    """Fails if windows do not start `stride` tokens apart."""
    samples = text_samples(range(100), window=20, stride=40, context=5)
    assert [sample.token_ids[0] for sample in samples] == [0, 40, 80]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((20, 15, 20), "a window of 20 tokens with a context of 20 scores none"),
        ((20, 15, 0), "context must be at least 1 and less than window"),
        ((20, 14, 5), "stride 14 scores tokens twice; it must be at least window - context, 15"),
        ((60, 50, 10), "the text has 100 tokens to score, but two windows of 60 at stride 50 need 110"),
    ],
)
def test_sizes_that_do_not_fit(sizes: tuple[int, int, int], message: str) -> None:
    """Fails if windows are allowed that score no token, or score a token twice."""
    window, stride, context = sizes
    with pytest.raises(EvaluationError, match=message):
        text_samples(range(100), window, stride, context)
