"""Options that are unknown, misspelt or not ours, and what a refusal shows of them."""

from typing import Any

import pytest

from tests.harness.engine import Ask, Engine
from tests.harness.refused_requests import PROMPTS, refused


@pytest.mark.parametrize("value", ["yes", 2, [1]])
def test_paths_are_asked_for_with_true_or_false(llama: Engine, value: Any) -> None:
    """Fails if a request that asks for its paths in another way gets none and is not told why."""
    error = refused(llama, {"buddy_paths": value})
    assert error.parameter == "vllm_xargs.buddy_paths"
    assert "true or false" in str(error)


def test_an_option_that_does_not_exist_is_refused_by_name(llama: Engine) -> None:
    """Fails if a misspelt option is passed over: the request would run at another budget than it asked for."""
    error = refused(llama, {"buddy_bugdet": 0.5})
    assert error.parameter == "vllm_xargs.buddy_bugdet"
    names = ("buddy_budget", "buddy_prompt", "buddy_mode", "buddy_context_tokens", "buddy_paths", "buddy_price")
    assert ", ".join(names) in str(error)


MISSPELT = {
    "buddy_buget": "buddy_budget",
    "Buddy-Budget": "buddy_budget",
    "budy_budget": "buddy_budget",
    "buddybudget": "buddy_budget",
    "buddy_min": "buddy_auto_min",
    "buddy_context_token": "buddy_context_tokens",
}


@pytest.mark.parametrize("key", MISSPELT)
def test_a_misspelt_option_is_refused_with_the_right_name(llama: Engine, key: str) -> None:
    """Fails if a slip of the pen is served at the default budget, or the refusal does not tell the right name."""
    error = refused(llama, {key: 0.5})
    assert error.parameter == f"vllm_xargs.{key}"
    assert f"did you mean '{MISSPELT[key]}'?" in str(error)


def test_what_a_refusal_shows_of_a_huge_option_is_short(llama: Engine) -> None:
    """Fails if a request's megabytes come back in the response and in the log."""
    nested: list[Any] = [["x" * 50] * 50] * 50
    huge = "9" * 10**6
    for options in ({"buddy_budget": huge}, {"buddy_mode": nested}, {"buddy_prompt": [huge]}, {f"buddy_{huge}": 1}):
        error = refused(llama, options)
        assert len(str(error)) < 600
        assert len(str(error.value)) <= 80
        assert "\n" not in str(error)


def test_options_of_others_are_left_alone(llama: Engine) -> None:
    """Fails if extra arguments that are not ours are refused."""
    others = {"other": [1, "x"], "budget": 2, "session_id": "a", "mode": "fast", "": 0, "buddy_budget": None}
    llama.run([Ask(PROMPTS[0], None, 2, {"extra_args": others})])
