"""Options of requests drawn at random; `python -m tools.fuzz` draws more."""

from typing import Any

import pytest

from tools.fuzzing import options
from vllm_buddy.serving.admission import options as admission

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


def test_a_request_of_many_keys_does_not_hold_up_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if each key that a client makes up takes the API server as long as a step: all its streams wait for it."""
    compared, compare = [], admission.get_close_matches

    def counted(key: str, *args: Any, **kwargs: Any) -> Any:
        compared.append(key)
        return compare(key, *args, **kwargs)

    monkeypatch.setattr(admission, "get_close_matches", counted)
    strange = {f"txet_snekot_yddub_{number}": 1 for number in range(5000)}
    limits = options.limits_of_servers()[0]
    assert options.check(limits, {"buddy_budget": 0.5, **strange}, 8)
    assert len(compared) < 100
    assert not options.check(limits, {**strange, "buddy_bugdet": 0.5}, 8)
