"""What cannot be served is refused when an answer is asked for, before its stream begins."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM

from tests.harness.server_config import configure
from tests.harness.tiny_models import VOCAB_SIZE
from vllm_buddy.serving.patches.requests import wrap_generate


@pytest.fixture(scope="module")
def routed(tiny: Any) -> Any:
    """Stands for an engine client, or what answers requests with one."""
    return SimpleNamespace(model_config=configure(tiny("llama")).model_config)


def tokens(*token_ids: int) -> dict[str, Any]:
    """A prompt as vLLM's API server hands it to the engine client."""
    return {"type": "token", "prompt_token_ids": list(token_ids)}


def asked(owner: Any, prompt: Any, **options: Any) -> Any:
    params = SamplingParams(extra_args={f"buddy_{key}": value for key, value in options.items()})
    return AsyncLLM.generate(owner, prompt, params, "request")


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"budget": 7}, "vllm_xargs.buddy_budget"),
        ({"budjet": 0.5}, "vllm_xargs.buddy_budjet"),
        ({"context_tokens": 4}, "vllm_xargs.buddy_context_tokens"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_generated(
    routed: Any, options: dict[str, Any], parameter: str
) -> None:
    """Fails if vLLM answers HTTP 200 and says in the stream that the request is wrong."""
    with pytest.raises(VLLMValidationError) as caught:
        asked(routed, tokens(5, 6, 7), **options)
    assert caught.value.parameter == parameter


def test_a_token_id_without_a_route_is_refused_before_anything_is_generated(routed: Any) -> None:
    """Fails if it is found after HTTP 200."""
    with pytest.raises(VLLMValidationError, match="not in the model's vocabulary"):
        asked(routed, tokens(5, VOCAB_SIZE))


@pytest.mark.parametrize("prompt", ["text", {"prompt": "text"}, {"prompt_token_ids": [5]}], ids=str)
def test_a_prompt_that_is_not_rendered_is_left_to_where_it_is(routed: Any, prompt: Any) -> None:
    """Fails if a program that sends text to the engine itself is refused, or its options are not checked."""
    assert asked(routed, prompt, context_tokens=4).ag_running is False
    with pytest.raises(VLLMValidationError):
        asked(routed, prompt, budget=7)


def test_the_responses_api_refuses_before_it_stores_or_streams(routed: Any) -> None:
    """Fails if a stream of it breaks off without a reason, or a response in the background stays queued for ever."""
    wrap_generate(OpenAIServingResponses, "_generate_with_builtin_tools", prompt="engine_input")
    params = SamplingParams(extra_args={"buddy_budget": 7})
    given = {"request_id": "r", "engine_input": tokens(5), "sampling_params": params, "context": None}
    with pytest.raises(VLLMValidationError, match="buddy_budget"):
        OpenAIServingResponses._generate_with_builtin_tools(routed, **given)


def test_other_models_are_not_checked(tiny: Any) -> None:
    """Fails if a stock server in the same environment refuses what it would ignore."""
    stock = SimpleNamespace(model_config=SimpleNamespace(model_impl="auto"))
    assert asked(stock, tokens(5), budget=7).ag_running is False
