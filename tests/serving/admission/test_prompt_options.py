"""What depends on the prompt: the tokens that are routed by, ids that the model lacks, and sessions without one."""

import math
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from tests.harness.engine import Ask, Engine
from tests.harness.refused_requests import PROMPTS, refused, session_request
from tests.harness.tiny_models import VOCAB_SIZE


@pytest.mark.parametrize("value", [0, -1, len(PROMPTS[1]) + 1, 2**40, 3.0, "3", True, [3], math.nan], ids=repr)
def test_a_context_that_is_not_within_the_prompt_is_refused(llama: Engine, value: Any) -> None:
    """Fails if the context is cut to the prompt in silence, or ends the engine where the prompt is routed."""
    error = refused(llama, {"buddy_budget": 0.5, "buddy_context_tokens": value})
    assert error.parameter == "vllm_xargs.buddy_context_tokens"
    assert f"from 1 to {len(PROMPTS[1])}" in str(error)


def test_a_context_of_one_token_and_of_the_whole_prompt_are_served(llama: Engine) -> None:
    """Fails if the smallest or the largest allowed context is refused."""
    llama.configure("masked", 4)
    asks = [Ask(PROMPTS[1], 0.5, 4, context=context) for context in (1, len(PROMPTS[1]))]
    llama.check(asks, llama.run(asks))


@pytest.mark.parametrize("token_id", [VOCAB_SIZE, VOCAB_SIZE + 63, 2**31, -1])
def test_a_token_id_that_the_model_lacks_is_refused(llama: Engine, token_id: int) -> None:
    """Fails if it reaches the router's tables, where it would end the engine and all requests with it.

    vLLM checks ids against its tokenizer, of which the engine here has none, and lets ids pass that only it has.
    """
    good = Ask(PROMPTS[0], 0.5, 6)
    llama.add(good, "good")
    for budget in (0.5, 1.0, None):
        with pytest.raises(VLLMValidationError, match=f"token id {token_id} .* 0 to {VOCAB_SIZE - 1}"):
            llama.add(Ask((1, token_id, 2), budget, 2))
    outputs = llama.finish()
    llama.check([good], [outputs["good"]])
    llama.run([Ask((0, VOCAB_SIZE - 1), 0.5, 2)])


SESSION_OPTIONS = ({"buddy_budget": 0.5}, {"buddy_budget": 1.0}, {"buddy_context_tokens": 1}, {"buddy_price": 0.1})


@pytest.mark.parametrize("extra_args", SESSION_OPTIONS, ids=str)
def test_a_streaming_input_session_that_asks_for_a_budget_is_refused(llama: Engine, extra_args: dict[str, Any]) -> None:
    """Fails if a session, which has no prompt to route by, runs at full depth although it asked for something else."""
    (key,) = extra_args
    if key == "buddy_price":
        extra_args = {**extra_args, "buddy_budget": "auto"}
    with pytest.raises(VLLMValidationError, match="streaming-input session runs at full depth") as caught:
        session_request(llama, extra_args)
    assert caught.value.parameter.startswith("vllm_xargs.buddy_")


def test_a_streaming_input_session_without_options_passes(llama: Engine) -> None:
    """Fails if sessions are refused that ask for nothing, or a session is not told from an ordinary request."""
    assert session_request(llama, None).resumable
    assert session_request(llama, {"other": 1}).resumable
