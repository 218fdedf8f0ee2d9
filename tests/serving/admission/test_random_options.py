"""Options of requests drawn at random; `python -m tools.fuzz` draws more."""

import pytest

from tools.fuzzing import options

NUM_CASES = 400


def test_random_options_are_resolved_or_refused_in_one_line() -> None:
    """Fails if options end in another error than vLLM's, are accepted in silence, or are refused without a name."""
    refused = options.fuzz(NUM_CASES)
    assert 0.3 * NUM_CASES < refused < 0.95 * NUM_CASES


@pytest.mark.parametrize("length", [1, 64])
def test_each_way_to_write_a_misspelt_key_is_refused(length: int) -> None:
    """Fails if one of them is served at the default budget."""
    for limits in options.limits_of_servers():
        for key in options.MISSPELT:
            for value in (0.5, "auto", None):
                assert not options.check(limits, {key: value}, length)
