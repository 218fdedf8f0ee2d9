"""The options of budget "auto": prices and ranges that are served, and those that are refused."""

import math
from dataclasses import replace
from typing import Any

import pytest

from tests.harness.engine import Ask, Engine
from tests.harness.refused_requests import PROMPTS, refused


def limit(engine: Engine, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Change what the server allows requests with budget "auto"."""
    model_config = engine.llm.llm_engine.model_config
    limits = model_config.buddy_limits
    monkeypatch.setattr(model_config, "buddy_limits", replace(limits, auto=replace(limits.auto, **changes)))


def test_auto_is_refused_without_a_budget_predictor(llama: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if "auto" is taken for a number, or its refusal does not say why and what else can be sent."""
    model_config = llama.llm.llm_engine.model_config
    monkeypatch.setattr(model_config, "buddy_limits", replace(model_config.buddy_limits, auto=None))
    error = refused(llama, {"buddy_budget": "auto"})
    assert error.parameter == "vllm_xargs.buddy_budget"
    assert all(told in str(error) for told in ("no Budget Predictor", "(0, 1]", "train-budget"))
    assert "auto" not in str(refused(llama, {"buddy_budget": "half"}))


@pytest.mark.parametrize("value", ["Auto", "auto ", "AUTO", ["auto"]], ids=repr)
def test_what_only_looks_like_auto_is_refused(llama: Engine, value: Any) -> None:
    """Fails if a misspelt "auto" is served, or the user is not told how it is spelt."""
    error = refused(llama, {"buddy_budget": value})
    assert error.parameter == "vllm_xargs.buddy_budget"
    assert '(0, 1] or "auto"' in str(error)


@pytest.mark.parametrize("value", [-0.1, -1, math.nan, math.inf, -math.inf, True, "1", "", [1.0], {}], ids=repr)
def test_a_price_that_is_no_finite_number_from_0_up_is_refused(llama: Engine, value: Any) -> None:
    """Fails if a bad price ends the engine, or turns the choice around."""
    error = refused(llama, {"buddy_budget": "auto", "buddy_price": value})
    assert error.parameter == "vllm_xargs.buddy_price"
    assert "buddy_price" in str(error)
    assert "from 0 up" in str(error)


@pytest.mark.parametrize("key", ["buddy_auto_min", "buddy_auto_max"])
@pytest.mark.parametrize("value", [0, 1.5, math.nan, "0.5", "auto", True, [0.5]], ids=repr)
def test_an_end_of_the_range_that_is_no_budget_is_refused(llama: Engine, key: str, value: Any) -> None:
    """Fails if the range of "auto" is not checked as budgets are."""
    error = refused(llama, {"buddy_budget": "auto", key: value})
    assert error.parameter == f"vllm_xargs.{key}"
    assert "(0, 1]" in str(error)


@pytest.mark.parametrize("key", ["buddy_auto_min", "buddy_auto_max"])
@pytest.mark.parametrize("value", [0.4, 0.9])
def test_a_range_beyond_the_servers_is_refused_with_the_servers(
    llama: Engine, monkeypatch: pytest.MonkeyPatch, key: str, value: float
) -> None:
    """Fails if a request makes the server spend, or save, more than its operator lets "auto"."""
    limit(llama, monkeypatch, smallest=0.5, largest=0.8)
    error = refused(llama, {"buddy_budget": "auto", key: value})
    assert error.parameter == f"vllm_xargs.{key}"
    assert "0.5 to 0.8" in str(error)


@pytest.mark.parametrize(("low", "high"), [(0.625, 0.7), (0.8, 0.5), (0.9, None)])
def test_a_range_without_a_budget_of_the_grid_is_refused_with_the_grid(
    llama: Engine, monkeypatch: pytest.MonkeyPatch, low: float, high: float | None
) -> None:
    """Fails if an empty choice ends the engine. Of the grid of 3, 4, 6 and 8 layers the server allows 4 and 6."""
    limit(llama, monkeypatch, smallest=0.5, largest=0.95)
    error = refused(llama, {"buddy_budget": "auto", "buddy_auto_min": low, "buddy_auto_max": high})
    assert error.parameter == "vllm_xargs.buddy_auto_min"
    assert "among 0.5, 0.8 (" in str(error)


@pytest.mark.parametrize("budget", [0.5, None])
@pytest.mark.parametrize("key", ["buddy_price", "buddy_auto_min", "buddy_auto_max"])
def test_an_option_of_auto_beside_another_budget_is_refused(llama: Engine, key: str, budget: float | None) -> None:
    """Fails if a price that changes nothing is accepted in silence."""
    error = refused(llama, {"buddy_budget": budget, key: 0.5})
    assert error.parameter == f"vllm_xargs.{key}"
    assert f'budget "auto", but the budget is {budget or 1:g}' in str(error)


def test_options_of_auto_need_no_budget_where_auto_is_the_default(
    llama: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the server's default does not count as the request's budget when its options are checked."""
    for config in (llama.llm.llm_engine.model_config, llama.scheduler.vllm_config.model_config):
        monkeypatch.setattr(config, "buddy_limits", replace(config.buddy_limits, default_budget="auto"))
    monkeypatch.setattr(llama.scheduler, "_limits", replace(llama.scheduler._limits, default_budget="auto"))
    asks = [Ask(PROMPTS[0], None, 2, options={"buddy_price": price}) for price in (0, 1e6)]
    told = [output.kv_transfer_params["buddy"] for output in llama.run(asks)]
    assert [(outcome["depth"], outcome["price"]) for outcome in told] == [(8, 0.0), (3, 1e6)]
    error = refused(llama, {"buddy_budget": 0.5, "buddy_price": 1.0})
    assert error.parameter == "vllm_xargs.buddy_price"


def test_a_price_of_minus_zero_is_zero(llama: Engine) -> None:
    """Fails if the response tells a price that nobody writes."""
    limits = llama.llm.llm_engine.model_config.buddy_limits
    assert str(limits.resolve({"buddy_budget": "auto", "buddy_price": -0.0}).price) == "0.0"
