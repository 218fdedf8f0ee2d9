"""Which budgets a request may ask for, and what becomes of those that ask for another."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from vllm.exceptions import VLLMValidationError

from tests.harness.engine import Ask, Engine
from tests.harness.refused_requests import PROMPTS, refused, session_request
from vllm_buddy.method import smallest_budget
from vllm_buddy.serving.admission.options import OptionError

SMALLEST = "0.375"  # three of eight layers

OUT_OF_RANGE = (0, 0.0, -0.5, -1, 1.0001, 2, 2**40, math.nan, math.inf, -math.inf)
WRONG_TYPE = ([0.5], [], (0.5,), {"b": 0.5}, "half", "", "0.5", "NaN", True, False, b"0.5", np.array([0.5, 0.5]))
TOO_LOW = (0.374, 0.25, 0.1, 1e-9, 5e-324)


@pytest.mark.parametrize("value", [*OUT_OF_RANGE, *WRONG_TYPE], ids=lambda v: repr(v)[:20])
def test_a_budget_that_is_no_number_in_range_is_refused(llama: Engine, value: Any) -> None:
    """Fails if a bad budget is served as something else, kills the engine, or is refused without saying why."""
    error = refused(llama, {"buddy_budget": value})
    assert error.parameter == "vllm_xargs.buddy_budget"
    assert "buddy_budget" in str(error)
    assert "(0, 1]" in str(error)


@pytest.mark.parametrize("value", TOO_LOW)
def test_a_budget_below_three_layers_is_refused_with_the_smallest_allowed(llama: Engine, value: float) -> None:
    """Fails if a path would lack a middle layer, or the user is not told what the least is."""
    error = refused(llama, {"buddy_budget": value})
    assert error.parameter == "vllm_xargs.buddy_budget"
    assert SMALLEST in str(error)


def test_the_smallest_budget_need_not_be_rounded(llama: Engine) -> None:
    """Fails if 3 / L is refused where it has more decimals than the smallest budget that messages name."""
    limits = llama.llm.llm_engine.model_config.buddy_limits
    limits = replace(limits, num_layers=32, min_budget=smallest_budget(32), depths=None)
    assert limits.resolve({"buddy_budget": 3 / 32}).depth == 3
    with pytest.raises(OptionError, match=r"below the smallest allowed budget 0\.094"):
        limits.resolve({"buddy_budget": 0.0937})


def test_a_budget_below_the_servers_floor_is_refused_with_the_floor(
    llama: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if `min_budget` of the server is not enforced."""
    model_config = llama.llm.llm_engine.model_config
    monkeypatch.setattr(model_config, "buddy_limits", replace(model_config.buddy_limits, min_budget=0.6))
    assert "0.6" in str(refused_only(llama, 0.59))
    llama.run([Ask(PROMPTS[1], 0.6, 2)])


def test_a_budget_above_the_servers_ceiling_is_refused_with_the_ceiling(
    llama: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a client can make the server spend more than `max_budget`, by whichever option."""
    model_config = llama.llm.llm_engine.model_config
    limits = replace(model_config.buddy_limits, max_budget=0.75, default_budget=0.75)
    monkeypatch.setattr(model_config, "buddy_limits", limits)
    assert "above the largest allowed budget 0.75" in str(refused_only(llama, 0.76))
    assert "largest allowed budget" in str(refused_only(llama, 1.0))
    error = refused(llama, {"buddy_budget": 0.5, "buddy_prompt": "full"})
    assert error.parameter == "vllm_xargs.buddy_prompt"
    assert "largest budget that a request may ask for is 0.75" in str(error)
    with pytest.raises(VLLMValidationError, match=r"session runs at full depth, .* is 0\.75"):
        session_request(llama, None)
    llama.run([Ask(PROMPTS[1], 0.75, 2)])


def refused_only(engine: Engine, budget: float) -> Any:
    with pytest.raises(VLLMValidationError) as caught:
        engine.add(Ask(PROMPTS[1], budget, 2))
    return caught.value


def test_a_depth_that_the_library_lacks_is_refused_with_those_it_has(
    llama: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if `paths: library` meets a depth without paths in the scheduler, where it would end the engine."""
    model_config = llama.llm.llm_engine.model_config
    monkeypatch.setattr(model_config, "buddy_limits", replace(model_config.buddy_limits, depths=(4, 6)))
    message = str(refused_only(llama, 0.625))
    assert "5 of 8" in message
    assert "4, 6, 8" in message
    llama.run([Ask(PROMPTS[1], budget, 2) for budget in (0.5, 0.75, 1.0)])


@pytest.mark.parametrize("budget", [1, 1.0, 0.375, np.float64(0.5)])
def test_budgets_at_the_edge_are_served(llama: Engine, budget: float) -> None:
    """Fails if the smallest or the largest allowed budget is refused."""
    llama.configure("masked", 4)
    ask = Ask(PROMPTS[2], budget, 4)
    llama.check([ask], llama.run([ask]))
