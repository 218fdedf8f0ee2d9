"""Requests that vLLM must refuse, sent beside one that must not notice."""

from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from tests.harness.engine import Ask, Engine
from tests.harness.tiny_models import random_prompts

PROMPTS = [tuple(p) for p in random_prompts(4, seed=61, min_tokens=20, max_tokens=60)]


def refused(engine: Engine, extra_args: dict[str, Any]) -> Any:
    """Send a request that must be refused beside one that must not notice; returns vLLM's error."""
    good = Ask(PROMPTS[0], 0.5, 6)
    engine.add(good, "good")
    engine.step()
    with pytest.raises(VLLMValidationError) as caught:
        engine.add(Ask(PROMPTS[1], None, 6, {"extra_args": extra_args}), "bad")
    outputs = engine.finish()
    assert list(outputs) == ["good"]
    engine.check([good], [outputs["good"]])
    return caught.value


def session_request(engine: Engine, extra_args: dict[str, Any] | None) -> Any:
    """What vLLM makes of one chunk of a streaming-input session."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=2, extra_args=extra_args)
    prompt = {"prompt_token_ids": list(PROMPTS[0])}
    processor = engine.llm.llm_engine.input_processor
    return processor.process_inputs("session", prompt, params, ("generate",), resumable=True)
