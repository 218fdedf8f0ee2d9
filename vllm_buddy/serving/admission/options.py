"""The options that a request may send: `vllm_xargs` over HTTP, `SamplingParams(extra_args=...)` offline.

They are checked where vLLM checks its own options, so that a wrong one is vLLM's validation error: HTTP 400 in the
server, with the name of the parameter. `limits.py` says what a server allows.
"""

from collections.abc import Mapping
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_buddy.errors import BudgetError

BUDGET_KEY = "buddy_budget"
CONTEXT_TOKENS_KEY = "buddy_context_tokens"
PRICE_KEY = "buddy_price"
AUTO_MIN_KEY = "buddy_auto_min"
AUTO_MAX_KEY = "buddy_auto_max"
PROMPT_KEY = "buddy_prompt"
ROUTED_PROMPT, FULL_PROMPT = "routed", "full"
MODE_KEY = "buddy_mode"
BUDGET_MODE, LOSSLESS = "budget", "lossless"
AUTO_KEYS = (PRICE_KEY, AUTO_MIN_KEY, AUTO_MAX_KEY)
_KEYS = (BUDGET_KEY, PROMPT_KEY, MODE_KEY, CONTEXT_TOKENS_KEY, *AUTO_KEYS)
_PREFIX = "buddy_"


class OptionError(BudgetError):
    """An option of a request that cannot be served. key: its name."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


def verify_options(params: SamplingParams, model_config: Any) -> None:
    """Raise vLLM's validation error for options that this server cannot serve.

    Checks everything that does not depend on the prompt; see verify_with_prompt for the rest.

    model_config: vLLM's, with the server's RequestLimits as `buddy_limits`.
    """
    extra_args = params.extra_args or {}
    for key in extra_args:
        if key.startswith(_PREFIX) and key not in _KEYS:
            raise _refused(key, f"unknown option '{key}'; vllm_buddy knows {', '.join(_KEYS)}", extra_args[key])
    try:
        model_config.buddy_limits.resolve(extra_args)
    except OptionError as error:
        raise _refused(error.key, f"{error.key}: {error}", extra_args.get(error.key)) from None


def verify_with_prompt(
    params: SamplingParams,
    num_prompt_tokens: int,
    *,
    is_streaming_input: bool,
    full_prompt: bool = False,
    max_budget: float = 1.0,
) -> None:
    """Raise vLLM's validation error for options that do not fit the prompt.

    is_streaming_input: whether the request is a session whose prompt grows while it runs (vLLM's `resumable`). There is
        no prompt to route by, so it runs at full depth and may not ask for anything else. vLLM checks each chunk of a
        session so, and the opening of one as an ordinary request of one token.
    full_prompt: whether the prompt runs all layers, by the request's own option or the server's setting.
    max_budget: the largest that the server allows.
    """
    extra_args = params.extra_args or {}
    if is_streaming_input:
        asked = {key: extra_args[key] for key in _KEYS if extra_args.get(key) is not None}
        for key, value in asked.items():
            raise _refused(
                key, f"{key}: a streaming-input session runs at full depth; leave out {', '.join(asked)}", value
            )
        if max_budget < 1.0:
            raise _refused(
                BUDGET_KEY,
                f"{BUDGET_KEY}: a streaming-input session runs at full depth, but the largest budget of this server is "
                f"{max_budget:g}",
                None,
            )
    value = context_tokens(extra_args)
    if value is None:
        return
    if full_prompt:
        raise _refused(
            CONTEXT_TOKENS_KEY, f'{CONTEXT_TOKENS_KEY}: goes with {PROMPT_KEY} "{ROUTED_PROMPT}"; send that too', value
        )
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= num_prompt_tokens:
        raise _refused(
            CONTEXT_TOKENS_KEY,
            f"{CONTEXT_TOKENS_KEY}: {value!r} is not an integer from 1 to {num_prompt_tokens}, the prompt's length",
            value,
        )


def context_tokens(extra_args: Mapping[str, Any] | None) -> int | None:
    """How many leading tokens of the prompt decide a request's first path; None: all of them."""
    return (extra_args or {}).get(CONTEXT_TOKENS_KEY)


def _refused(key: str, message: str, value: Any) -> VLLMValidationError:
    return VLLMValidationError(message, parameter=f"vllm_xargs.{key}", value=value)
