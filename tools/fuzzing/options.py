"""Draws options of requests, and checks that each is resolved to something that can be served, or refused in a line."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_buddy.method import full_path
from vllm_buddy.method.budget import MIN_DEPTH
from vllm_buddy.serving.admission.auto_limits import AutoBudget, AutoLimits
from vllm_buddy.serving.admission.limits import FixedBudget, RequestLimits
from vllm_buddy.serving.admission.options import verify_options, verify_token_ids, verify_with_prompt

OWN_KEYS = (
    "buddy_budget",
    "buddy_prompt",
    "buddy_mode",
    "buddy_context_tokens",
    "buddy_price",
    "buddy_auto_min",
    "buddy_auto_max",
)
MISSPELT = ("buddy_buget", "buddy_", "buddy", "Buddy_Budget", "buddy-budget", "budy_budget", "buddy_budget ", "buddy_x")
OTHERS = ("", "budget", "session_id", "temperature", "user", "__proto__", "mode")
MOST_CHARACTERS = 900  # of a refusal
_WORDS = ("auto", "Auto", "full", "routed", "budget", "lossless", "0.5", "1", "NaN", "true", "null", "\x00", "9" * 5000)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from((0, 1, -1, 2**31, 2**63, 2**64 - 1, -(2**63), 10**400)),
    st.just(5000).map(lambda digits: 10**digits),  # Python does not print it
    st.floats(),
    st.sampled_from((-0.0, 5e-324, 1.0, 0.75, 0.5, math.nextafter(1.0, 2.0), math.inf, -math.inf, math.nan, 1e308)),
    st.text(max_size=20),
    st.sampled_from(_WORDS),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)
# Most options are nearly right: what only looks strange is refused at the first check.
_USUAL: dict[str, st.SearchStrategy[Any]] = {
    "buddy_budget": st.floats(0.05, 1.0) | st.just("auto"),
    "buddy_prompt": st.sampled_from(("full", "routed")),
    "buddy_mode": st.sampled_from(("budget", "lossless")),
    "buddy_context_tokens": st.integers(-1, 70),
    "buddy_price": st.floats(0, 10),
    "buddy_auto_min": st.floats(0.05, 1.0),
    "buddy_auto_max": st.floats(0.05, 1.0),
}


def _option(key: str) -> st.SearchStrategy[tuple[str, Any]]:
    usual = _USUAL.get(key)
    return st.tuples(st.just(key), values if usual is None else usual | values)


options = st.lists(st.sampled_from((*OWN_KEYS, *OWN_KEYS, *MISSPELT, *OTHERS)).flatmap(_option), max_size=4).map(dict)


def limits_of_servers() -> list[RequestLimits]:
    """What servers of several kinds allow."""
    auto = AutoLimits(
        num_layers=30,
        depths=(15, 18, 22, 26, 30),
        smallest=0.4,
        largest=1.0,
        price=0.5,
        load_price=None,
        load_floor=0.4,
    )
    usual = RequestLimits(30, default_budget=1.0, min_budget=0.1, max_budget=1.0, layers=full_path(30), auto=auto)
    return [
        usual,
        replace(usual, auto=None),
        replace(usual, lossless=True, prompt="full"),
        replace(usual, default_budget="auto", auto=replace(auto, smallest=0.5, largest=0.9)),
        replace(usual, depths=(15, 22), min_budget=0.5),
    ]


def check(limits: RequestLimits, asked: Mapping[str, Any], num_prompt_tokens: int) -> bool:
    """Whether a server with these limits serves a request with these options.

    Raises:
        AssertionError: it serves what it should not, or refuses it in a way that does not help. Any other error: what
            would have ended the request with HTTP 500, or the engine.
    """
    model_config = SimpleNamespace(buddy_limits=limits)
    try:
        params = SamplingParams(extra_args=dict(asked))  # vLLM itself refuses integers of more than 64 bits
        verify_options(params.extra_args, model_config)
        full = limits.full_prompt(asked)
        verify_with_prompt(params, num_prompt_tokens, is_streaming_input=False, full_prompt=full)
    except VLLMValidationError as error:
        _check_refusal(error)
        return False
    assert not set(asked) & set(MISSPELT), asked
    _check_resolved(limits, limits.resolve(asked), asked)
    return True


def check_token_ids(token_ids: list[int], vocab_size: int) -> bool:
    """Whether a prompt of these ids is served."""
    try:
        verify_token_ids(token_ids, vocab_size)
    except VLLMValidationError as error:
        _check_refusal(error)
        return False
    assert all(0 <= token_id < vocab_size for token_id in token_ids)
    return True


def fuzz(num_cases: int) -> int:
    """Check `num_cases` random options; returns how many were refused."""
    refused = 0
    servers = limits_of_servers()

    def run(server: int, asked: dict[str, Any], length: int, token_ids: list[int]) -> None:
        nonlocal refused
        refused += not check(servers[server], asked, length)
        check_token_ids(token_ids, 100)

    ids = st.lists(st.integers(-5, 110) | st.integers(), max_size=5)
    test = given(st.integers(0, len(servers) - 1), options, st.integers(1, 64), ids)(run)
    drawn(test, num_cases)()
    return refused


def drawn(test: Callable[[], None], num_cases: int) -> Callable[[], None]:
    """The test with this number of cases, the same on every run."""
    chosen = settings(
        max_examples=num_cases,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return chosen(test)


def _check_refusal(error: VLLMValidationError) -> None:
    text = str(error)
    assert len(text) <= MOST_CHARACTERS, len(text)
    assert "\n" not in text, text
    assert "Traceback" not in text
    assert error.parameter is not None
    assert error.parameter.startswith(("vllm_xargs.", "prompt", "extra_args")), error.parameter


def _check_resolved(limits: RequestLimits, found: FixedBudget | AutoBudget, asked: Mapping[str, Any]) -> None:
    own = {key: value for key, value in asked.items() if key in OWN_KEYS and value is not None}
    budget = own.get("buddy_budget", limits.default_budget)
    if isinstance(found, AutoBudget):
        assert budget == "auto"
        assert limits.auto is not None
        assert found.depths
        assert set(found.depths) <= set(limits.auto.depths)
        assert math.isfinite(found.price)
        assert math.copysign(1, found.price) == 1
        return
    assert MIN_DEPTH <= found.depth <= limits.num_layers
    assert limits.min_budget <= found.budget <= 1
    if not found.lossless:
        assert type(budget) in (int, float)
        assert found.budget == budget
    assert not {"buddy_price", "buddy_auto_min", "buddy_auto_max"} & set(own)
