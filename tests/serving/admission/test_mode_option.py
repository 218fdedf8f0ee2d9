"""The modes that a request may ask for."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.harness.engine import Engine
from tests.harness.refused_requests import refused
from vllm_buddy.serving.admission.options import OptionError


@pytest.mark.parametrize("value", ["lossles", "", 1, True, ["lossless"]])
def test_a_mode_that_is_unknown_is_refused_with_those_that_are_known(llama: Engine, value: Any) -> None:
    """Fails if a misspelt mode is served as another one."""
    error = refused(llama, {"buddy_mode": value})
    assert error.parameter == "vllm_xargs.buddy_mode"
    assert '"budget" and "lossless"' in str(error)


def test_lossless_mode_needs_a_server_that_drafts(llama: Engine) -> None:
    """Fails if a request that asks to be sped up losslessly runs plainly without being told."""
    assert "--lossless-drafts" in str(refused(llama, {"buddy_mode": "lossless"}))


def test_lossless_mode_beside_a_budget_below_one_is_refused(llama: Engine) -> None:
    """Fails if one of two options that contradict each other wins silently."""
    limits = replace(llama.llm.llm_engine.model_config.buddy_limits, lossless=True)
    whole = limits.resolve({"buddy_mode": "lossless"})
    assert whole == limits.resolve({"buddy_mode": "lossless", "buddy_budget": 1.0})
    assert (whole.budget, whole.depth, whole.lossless) == (1.0, 8, True)
    for value in (True, "1", [1], np.array([1.0, 1.0])):
        with pytest.raises(OptionError, match=r"\(0, 1\]"):
            limits.resolve({"buddy_mode": "lossless", "buddy_budget": value})
    for key, value in (("buddy_budget", 0.5), ("buddy_budget", "auto"), ("buddy_price", 1.0)):
        with pytest.raises(OptionError, match='"lossless" runs all layers') as caught:
            limits.resolve({"buddy_mode": "lossless", key: value})
        assert caught.value.key == key
