"""Settings that no server starts with: unknown, impossible, or against each other."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.harness.engine import Tiny
from tests.harness.server_config import DRAFTS, configure, refusal
from tests.harness.tiny_models import (
    PREDICTOR_PRICE,
)
from vllm_buddy.serving.start.settings import engine_settings, known_settings


@pytest.mark.parametrize(
    "buddy",
    [
        {"artefact": "x"},
        {"route_every": "4"},
        {"route_every": 4.0},
        {"route_every": True},
        {"route_every": -1},
        {"decision_lag": -1},
        {"decision_lag": 0.5},
        {"kv_policy": "mask"},
        {"kv_policy": 1},
        {"paths": "some"},
        {"artifact": 3},
        {"default_budget": 0},
        {"default_budget": 1.5},
        {"default_budget": "0.5"},
        {"default_budget": True},
        {"default_budget": math.nan},
        {"min_budget": -0.5},
        {"min_budget": [0.5]},
        {"default_budget": "Auto"},
        {"default_budget": None},
        {"auto": {"min": "auto"}},
        {"auto": {"min": 0}},
        {"auto": {"max": 1.1}},
        {"auto": {"mim": 0.5}},
        {"auto": None},
        {"auto": 0.5},
        {"schedule": "token"},
        {"schedule": {"decode": "tokens"}},
        {"schedule": {"saved_layers": -1}},
        {"graphs": True},
        {"graphs": {"sizes": [2, 1]}},
        {"load": {}},
        {"load": 3.0},
        {"auto": {"price": -0.1}},
        {"auto": {"price": math.nan}},
        {"auto": {"price": math.inf}},
        {"auto": {"price": True}},
        {"auto": {"price": "1"}},
        {"load": {"price": -1}},
        {"load": {"price": math.inf}},
        {"load": {"price": 90.0, "waiting": [8, 1]}},
        {"load": {"price": 90.0, "waiting": [1, 1]}},
        {"load": {"price": 90.0, "waiting": [1]}},
        {"load": {"price": 90.0, "waiting": [1, 8.0]}},
        {"load": {"price": 90.0, "waiting": 8}},
        {"load": {"price": 90.0, "waiting": None}},
        {"load": {"price": 90.0, "running": [-1, 8]}},
        {"load": {"price": 90.0, "running": [False, True]}},
        {"load": {"price": 90.0, "kv_use": [0.5, 1.1]}},
        {"load": {"price": 90.0, "kv_use": [0.9, 0.5]}},
        {"load": {"price": 90.0, "kv_use": [math.nan, 0.5]}},
        {"load": {"price": 90.0, "floor": 0}},
        {"load": {"price": 90.0, "hysteresis": 1}},
        {"load": {"price": 90.0, "hysteresis": -0.1}},
        {"load": {"price": 90.0, "hysteresis": math.nan}},
        {"slo": {}},
        {"slo": {"itl_ms": 0}},
        {"slo": {"itl_ms": -5.0}},
        {"slo": {"ttft_ms": math.nan}},
        {"slo": {"ttft_ms": math.inf}},
        {"slo": {"ttft_ms": "500"}},
        {"slo": {"itl": 50}},
        {"slo": {"itl_ms": 50, "floor": 0}},
        {"slo": {"itl_ms": 50, "hysteresis": 1}},
        {"slo": 50},
    ],
    ids=str,
)
def test_a_setting_that_is_unknown_or_wrong_is_refused_with_the_known_ones(llama_model: Tiny, buddy: Any) -> None:
    """Fails if a misspelt or impossible setting starts a server that does something else."""
    message = refusal(llama_model, buddy)
    (name,) = buddy
    assert f"'{name}" in message
    assert all(known in message for known in known_settings())


@pytest.mark.parametrize("buddy", ["x", None, [], 3], ids=str)
def test_settings_that_are_no_object_are_refused(llama_model: Tiny, buddy: Any) -> None:
    """Fails if `buddy` given as something else than an object counts as no settings."""
    assert "kv_policy" in refusal(llama_model, additional_config={"buddy": buddy})


def test_a_dotted_setting_is_answered_with_the_nested_form(llama_model: Tiny) -> None:
    """Fails if the name that documentation and messages use for a setting is unknown without a way out."""
    assert '{"buddy": {"auto": {"min": ...}}}' in refusal(llama_model, {"auto.min": 0.5})


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [
        ("auto_min", 0.5, "auto.min"),
        ("price", 0.5, "auto.price"),
        ("load_price", 2.0, "load.price"),
        ("load_waiting", [1, 8], "load.waiting"),
        ("cuda_graphs", True, "graphs.enabled"),
        ("graph_sizes", [1, 2], "graphs.sizes"),
    ],
)
def test_a_setting_that_has_moved_is_answered_with_its_new_name(
    llama_model: Tiny, old: str, value: Any, new: str
) -> None:
    """Fails if an operator with an older configuration is told that a setting is unknown, and not where it is."""
    section, name = new.split(".")
    message = refusal(llama_model, {old: value})
    assert f"'{old}' is now '{new}'" in message
    assert f'{{"buddy": {{"{section}": {{"{name}": ...}}}}}}' in message


def test_a_default_budget_that_no_request_could_ask_for_is_refused(llama_model: Tiny, few_depths: Path) -> None:
    """Fails if the server's default is below its own floor, below three layers, or without a path in the library."""
    assert "0.375" in refusal(llama_model, {"default_budget": 0.3})
    assert "0.6" in refusal(llama_model, {"default_budget": 0.5, "min_budget": 0.6})
    message = refusal(llama_model, {"default_budget": 1.0, "max_budget": 0.75})
    assert "default_budget: budget 1 is above the largest allowed budget 0.75" in message
    assert "set default_budget" in message
    message = refusal(llama_model, {"artifact": str(few_depths), "default_budget": 0.7})
    assert "default_budget: budget 0.7 is 5 of 8 layers, for which the path library has no path" in message
    assert "it has paths of 3, 4, 6, 8 layers" in message
    for buddy in ({"default_budget": 0.75}, {"default_budget": 0.7, "paths": "free"}):
        configure(llama_model, {"artifact": str(few_depths), **buddy})


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "turned range": ({"auto": {"min": 0.8, "max": 0.5}}, "auto.max 0.5 is below auto.min, 0.8"),
    "range below all requests": (
        {"min_budget": 0.6, "auto": {"max": 0.5}},
        "auto.max 0.5 is below the smallest budget",
    ),
    "below min_budget": ({"min_budget": 0.6, "auto": {"min": 0.5}}, "auto.min 0.5 is below the smallest budget"),
    "above max_budget": (
        {"default_budget": 0.5, "max_budget": 0.75, "auto": {"max": 0.8}},
        "auto.max 0.8 is above max_budget 0.75",
    ),
    "ceiling below the floor": (
        {"default_budget": 0.5, "max_budget": 0.5, "min_budget": 0.6},
        "max_budget 0.5 is below the smallest budget a request may ask for, 0.6",
    ),
    "below three layers": ({"auto": {"min": 0.2}}, "0.375"),
    "nothing of the grid": ({"auto": {"min": 0.625, "max": 0.7}}, "has no budget in [0.625, 0.7]"),
    "floor above the range": (
        {"auto": {"max": 0.8}, "load": {"price": 90.0, "floor": 0.9}},
        "load.floor 0.9 lies outside",
    ),
    "floor below the range": (
        {"auto": {"min": 0.5}, "load": {"price": 90.0, "floor": 0.4}},
        "load.floor 0.4 lies outside",
    ),
    "no dearer": (
        {"auto": {"price": 2.0}, "load": {"price": 2.0}},
        "load.price 2 is not above the price without load, 2",
    ),
    "no dearer than the artifact says": (
        {"load": {"price": PREDICTOR_PRICE}},
        "is not above the price without load, 8",
    ),
    "two prices": (
        {"load": {"price": 90.0}, "slo": {"itl_ms": 50}},
        "'load' says by hand what 'slo' finds from latencies; leave out one of load.price and slo",
    ),
    "objective without a choice": (
        {"auto": {"max": 0.5}, "slo": {"itl_ms": 50, "floor": 0.5}},
        "slo has no two budgets to choose between",
    ),
    "floor of objectives above the range": (
        {"auto": {"max": 0.8}, "slo": {"itl_ms": 50, "floor": 0.9}},
        "slo.floor 0.9 lies outside",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_settings_of_auto_that_contradict_each_other_are_refused(llama_model: Tiny, name: str) -> None:
    """Fails if a server starts whose requests with budget "auto" would be refused, or whose load changes nothing."""
    buddy, told = CONTRADICTIONS[name]
    assert told in refusal(llama_model, buddy)


BELOW_FULL_DEPTH: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nothing left": ({"min_budget": 0.7}, {}, "below the smallest budget a request may ask for, 0.7"),
    "default above": ({"default_budget": 0.7}, {}, "default_budget: budget 0.7 is above the largest allowed"),
    "auto above": ({"auto": {"max": 0.7}}, {}, "auto.max 0.7 is above max_budget 0.65"),
    "auto from above": ({"auto": {"min": 0.7}}, {}, "max_budget 0.65 is below auto.min, 0.7"),
    "full prompts": ({"prompt": "full"}, {}, 'prompt "full"'),
    "tokens": ({"schedule": {"decode": "token"}}, {}, 'schedule "token"'),
    "lossless": ({}, {"speculative_config": DRAFTS}, "lossless drafts"),
}


@pytest.mark.parametrize("name", BELOW_FULL_DEPTH)
def test_what_needs_more_than_max_budget_is_refused(llama_model: Tiny, name: str) -> None:
    """Fails if a server starts that would need layers that it does not load."""
    buddy, options, told = BELOW_FULL_DEPTH[name]
    message = refusal(llama_model, {"max_budget": 0.65, **buddy}, **options)
    assert "0.65" in message
    assert told in message


def test_depths_per_token_are_refused_under_zero_and_bring_kv_only(llama_model: Tiny) -> None:
    """Fails if deep tokens attend to zeros of shallow ones, or the default leaves them nothing to attend to."""
    schedule = {"prefill": "token", "decode": "token"}
    assert '"kv_only"' in refusal(llama_model, {"schedule": schedule, "kv_policy": "zero"})
    assert engine_settings(configure(llama_model, {"schedule": schedule})).kv == "kv_only"
    assert engine_settings(configure(llama_model, {"schedule": schedule, "kv_policy": "masked"})).kv == "masked"
    assert engine_settings(configure(llama_model)).kv == "masked"


def test_settings_of_drafts_that_cannot_be_are_refused(llama_model: Tiny) -> None:
    """Fails if a depth that there is no path of, or a setting that nothing reads, is found out later."""
    assert "drafts.depth is 8" in refusal(llama_model, {"drafts": {"depth": 8}}, speculative_config=DRAFTS)
    assert "below drafts.ngram_min" in refusal(llama_model, {"drafts": {"ngram_max": 1}}, speculative_config=DRAFTS)
    assert "--lossless-drafts" in refusal(llama_model, {"drafts": {"depth": 4}})
    # The refining pass would write to a slot that the request may not have.
    one, refined = {**DRAFTS, "num_speculative_tokens": 1}, {"drafts": {"depth": 4, "refine_depth": 6}}
    assert "drafts.refine_depth needs two drafts" in refusal(llama_model, refined, speculative_config=one)


@pytest.mark.parametrize("buddy", [{"graphs": {"enabled": True}}, {"graphs": {"sizes": [1, 2]}}])
def test_what_the_device_does_not_have_is_refused(llama_model: Tiny, buddy: dict[str, Any]) -> None:
    """Fails if a server starts without what it was told to use."""
    assert "they need a CUDA device" in refusal(llama_model, buddy)
