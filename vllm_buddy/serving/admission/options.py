"""The options that a request may send: `vllm_xargs` over HTTP, `SamplingParams(extra_args=...)` offline.

They are checked where vLLM checks its own options, so that a wrong one is vLLM's validation error: HTTP 400 in the
server, with the name of the parameter. `limits.py` says what a server allows.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_buddy.errors import BudgetError, shown
from vllm_buddy.serving.admission.option_names import (
    BUDGET_KEY,
    CONTEXT_TOKENS_KEY,
    KEYS,
    PATHS_KEY,
    PROMPT_KEY,
    ROUTED_PROMPT,
)
from vllm_buddy.serving.start.attached import limits_of

_PREFIX = "buddy"
_ALIKE = 0.85  # similarity, from 0 to 1, from which a key is a misspelt one of ours: `budy_budget` has 0.96
_LONGEST_KEY = 64
_MOST_COMPARED = 64  # keys of a request that are compared with ours; a comparison may take half a millisecond
_SEPARATORS = str.maketrans("-. ", "___")


class OptionError(BudgetError):
    """An option of a request that cannot be served. key: its name."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


def verify_options(extra_args: Mapping[str, Any] | None, model_config: Any) -> None:
    """Raise vLLM's validation error for options that this server cannot serve.

    Checks everything that does not depend on the prompt; see verify_with_prompt for the rest.

    extra_args: of SamplingParams, which over HTTP are `vllm_xargs`.
    model_config: vLLM's, with the server's RequestLimits attached (see start/attached.py).
    """
    extra_args = extra_args or {}
    for number, key in enumerate(extra_args):
        if _is_misspelt(key, compare=number < _MOST_COMPARED):
            raise _refused(shown(key)[1:-1], _unknown(key), extra_args[key])
    if (paths := extra_args.get(PATHS_KEY)) not in (None, True, False):
        raise _refused(PATHS_KEY, f"{PATHS_KEY}: {shown(paths)} is not true or false", paths)
    try:
        limits_of(model_config).resolve(extra_args)
    except OptionError as error:
        raise _refused(error.key, f"{error.key}: {error}", extra_args.get(error.key)) from None


def verify_request(prompt: Any, params: Any, model_config: Any) -> None:
    """Raise vLLM's validation error for a request that cannot be served, as far as it is known before it is sent.

    prompt: as vLLM's front end takes it. What depends on it is checked where it is tokenized already (EngineInput).
    params: nothing is checked if they are no SamplingParams.
    model_config: as for verify_options.
    """
    if not isinstance(params, SamplingParams):
        return
    verify_options(params.extra_args, model_config)
    if isinstance(prompt, Mapping) and "type" in prompt and prompt.get("prompt_token_ids"):
        verify_tokenized(prompt["prompt_token_ids"], params, model_config)


def verify_tokenized(
    token_ids: Sequence[int], params: SamplingParams, model_config: Any, *, is_streaming_input: bool = False
) -> None:
    """Raise vLLM's validation error for a prompt that has no route, and for options that do not fit it.

    is_streaming_input: see verify_with_prompt. model_config: as for verify_options.
    """
    verify_token_ids(token_ids, model_config.get_vocab_size())
    limits = limits_of(model_config)
    verify_with_prompt(
        params,
        len(token_ids),
        is_streaming_input=is_streaming_input,
        full_prompt=limits.full_prompt(params.extra_args),
        max_budget=limits.max_budget,
    )


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
    max_budget: the largest that a request may ask for.
    """
    extra_args = params.extra_args or {}
    if is_streaming_input:
        if max_budget < 1.0:
            raise _refused(
                BUDGET_KEY,
                f"{BUDGET_KEY}: a streaming-input session runs at full depth, but the largest budget that a request "
                f"may ask for is {max_budget:g}",
                None,
            )
        asked = {key: extra_args[key] for key in KEYS if extra_args.get(key) is not None}
        if asked:
            key, value = next(iter(asked.items()))
            raise _refused(
                key, f"{key}: a streaming-input session runs at full depth; leave out {', '.join(asked)}", value
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
            f"{CONTEXT_TOKENS_KEY}: {shown(value)} is not an integer from 1 to {num_prompt_tokens}, the length of the "
            "prompt",
            value,
        )


def verify_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise vLLM's validation error for a prompt with token ids that the model does not have.

    vLLM lets ids pass that only the tokenizer has, and any without a tokenizer. The router's tables have no row for
    them, so in the scheduler such an id would end the engine, and with it all other requests.
    """
    if not token_ids:
        return
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise VLLMValidationError(
                f"token id {token_id} is not in the model's vocabulary; allowed are 0 to {vocab_size - 1}",
                parameter="prompt",
                value=token_id,
            )


def context_tokens(extra_args: Mapping[str, Any] | None) -> int | None:
    """How many leading tokens of the prompt decide a request's first path; None: all of them."""
    return (extra_args or {}).get(CONTEXT_TOKENS_KEY)


def wants_paths(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request asks which layers each of its tokens ran. vLLM turns JSON true into 1."""
    return bool((extra_args or {}).get(PATHS_KEY))


def _is_misspelt(key: Any, *, compare: bool) -> bool:
    """Whether a key is none of ours, but was meant to be. Keys of others are not ours to judge.

    compare: also with keys that begin otherwise.
    """
    if not isinstance(key, str) or key in KEYS:
        return False
    return _plain(key).startswith(_PREFIX) or (compare and bool(_alike(_plain(key), _ALIKE)))


def _unknown(key: str) -> str:
    meant = _alike(_plain(key), 0.6)
    suggestion = f"did you mean '{meant[0]}'? " if meant else ""
    return f"unknown option {shown(key)}; {suggestion}vllm_buddy knows {', '.join(KEYS)}"


@lru_cache(maxsize=4096)  # vLLM checks the options of a request once for each of its prompts
def _alike(plain: str, cutoff: float) -> tuple[str, ...]:
    """The known key that is most like a key, if any is; neither case nor the kind of separator counts: see `_plain`."""
    return tuple(get_close_matches(plain, KEYS, n=1, cutoff=cutoff))


def _plain(key: str) -> str:
    """The beginning of a key, which may have any length, in the spelling of ours."""
    return key[:_LONGEST_KEY].strip().lower().translate(_SEPARATORS)


def _refused(key: str, message: str, value: Any) -> VLLMValidationError:
    return VLLMValidationError(message, parameter=f"vllm_xargs.{key}", value=None if value is None else shown(value))
