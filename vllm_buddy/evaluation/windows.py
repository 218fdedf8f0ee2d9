"""Cuts a long text into windows that are scored independently."""

from collections.abc import Sequence

from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation.sample import Sample

MIN_WINDOWS = 2  # a standard error needs two


def check_window(window: int, stride: int, context: int) -> None:
    """Raise EvaluationError unless every token is scored at most once and every window scores some."""
    if not 0 < context < window:
        raise EvaluationError(
            f"a window of {window} tokens with a context of {context} scores none; context must be at least 1 and "
            "less than window"
        )
    if stride < window - context:
        raise EvaluationError(
            f"stride {stride} scores tokens twice; it must be at least window - context, {window - context}"
        )


def text_samples(token_ids: Sequence[int], window: int, stride: int, context: int) -> list[Sample]:
    """Return windows of `window` tokens whose starts are `stride` tokens apart; the rest at the end is not scored.

    Raises:
        EvaluationError: the text has fewer than two windows.
    """
    check_window(window, stride, context)
    starts = range(0, len(token_ids) - window + 1, stride)
    if len(starts) < MIN_WINDOWS:
        raise EvaluationError(
            f"the text has {len(token_ids)} tokens to score, but two windows of {window} at stride {stride} need "
            f"{window + stride}; give a longer text or a smaller --window"
        )
    return [Sample(token_ids[start : start + window], context) for start in starts]
