"""Tests how the soak judges answers and memory, and what it sends. No server is started."""

import random

import pytest

from benchmarks.soak import BUDGETS, DECODED_TOKENS, LEAST_SAMPLES, PROMPT_TOKENS, SHARED_TOKENS, draw, growth, verdict

LIKELIEST = [{"token_id:5": -0.1, "token_id:7": -2.0}, {"token_id:6": -0.7, "token_id:8": -0.7005}]


@pytest.mark.parametrize(
    ("found", "expected"),
    [([5, 6], "same"), ([5, 8], "tie"), ([7, 6], "wrong"), ([5, 9], "wrong")],
)
def test_an_answer_is_wrong_unless_the_two_tokens_are_equally_likely(found: list[int], expected: str) -> None:
    """Fails if a wrong token passes as a tie, or rounding counts as a wrong answer."""
    assert verdict(found, [5, 6], LIKELIEST) == expected


def test_an_answer_of_another_length_is_no_answer() -> None:
    """Fails if an answer that was cut short is compared as far as it goes."""
    with pytest.raises(ValueError, match="longer"):
        verdict([5], [5, 6], LIKELIEST)


def test_growth_leaves_out_the_warm_up() -> None:
    """Fails if memory that a server takes as it warms up counts as a leak, or a leak does not or of another process."""
    warms_up = [{"front end": 1 << 20, "engine": mib << 20} for mib in [1] * 20 + [99] * 80]
    assert growth(warms_up) == {"all": 0.0, "front end": 0.0, "engine": 0.0}
    leaks = [{"front end": 100 << 20, "engine": mib << 20} for mib in range(100, 200)]
    assert growth(leaks) == {"all": pytest.approx(0.26, abs=0.01), "front end": 0.0, "engine": 60.0}
    assert growth(leaks[: LEAST_SAMPLES - 1]) is None


def test_the_traffic_is_that_of_the_seed_and_has_every_kind() -> None:
    """Fails if two runs send different requests, or a kind of request never occurs."""
    text = list(range(1000))
    requests = draw(text, 600, 1.0, random.Random(0))
    assert requests == draw(text, 600, 1.0, random.Random(0))
    assert 500 < len(requests) < 700
    times = [at for at, _ in requests]
    assert times == sorted(times)
    assert times[-1] < 600
    found = [request for _, request in requests]
    assert {request.budget for request in found} == set(BUDGETS)
    assert {request.streamed for request in found} == {True, False}
    assert any(request.leaves_after for request in found)
    assert all(request.streamed for request in found if request.leaves_after)
    assert any(request.options for request in found)
    longest = PROMPT_TOKENS[1] + SHARED_TOKENS
    assert all(PROMPT_TOKENS[0] <= len(request.prompt) <= longest for request in found)
    assert all(DECODED_TOKENS[0] <= request.num_tokens <= DECODED_TOKENS[1] for request in found)
