"""A request's own options: `vllm_xargs` over HTTP, `SamplingParams(extra_args=...)` offline."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_buddy.errors import BudgetError
from vllm_buddy.method import depth_for_budget, parse_budget

BUDGET_KEY = "buddy_budget"
CONTEXT_TOKENS_KEY = "buddy_context_tokens"
_KEYS = (BUDGET_KEY, CONTEXT_TOKENS_KEY)
_PREFIX = "buddy_"


@dataclass(frozen=True)
class RequestLimits:
    """What a server allows its requests. Set on vLLM's ModelConfig as `buddy_limits` at start.

    depths: depths that the path library holds; None if all are allowed.
    """

    num_layers: int
    default_budget: float
    min_budget: float
    depths: tuple[int, ...] | None = None

    def budget(self, extra_args: Mapping[str, Any] | None) -> float:
        """The budget of a request: its own, or the server's default.

        Raises:
            BudgetError: not a number in (0, 1], below the floor, or of a depth the library lacks.
        """
        value = (extra_args or {}).get(BUDGET_KEY)
        if value is None:
            return self.default_budget
        if isinstance(value, str) and value == "auto":
            raise BudgetError(
                "budget is 'auto', but the server's artifact has no Budget Predictor; send a number in (0, 1]"
            )
        budget = parse_budget(value)
        if budget < self.min_budget:
            raise BudgetError(f"budget {budget:g} is below the smallest allowed budget {self.min_budget:g}")
        depth = depth_for_budget(budget, self.num_layers)
        if self.depths is not None and depth != self.num_layers and depth not in self.depths:
            allowed = ", ".join(str(d) for d in (*self.depths, self.num_layers))
            raise BudgetError(
                f"budget {budget:g} is {depth} of {self.num_layers} layers, for which the path library has no path; "
                f"it has paths of {allowed} layers"
            )
        return budget


def verify_request(params: SamplingParams, model_config: Any) -> None:
    """Raise vLLM's validation error, HTTP 400 in the server, for buddy options that cannot be served.

    All but the size of buddy_context_tokens, for which the prompt must be known; see verify_context.
    """
    extra_args = params.extra_args or {}
    for key in extra_args:
        if key.startswith(_PREFIX) and key not in _KEYS:
            raise VLLMValidationError(
                f"unknown option '{key}'; vllm_buddy knows {', '.join(_KEYS)}",
                parameter=f"vllm_xargs.{key}",
                value=extra_args[key],
            )
    try:
        model_config.buddy_limits.budget(extra_args)
    except BudgetError as error:
        raise VLLMValidationError(
            f"{BUDGET_KEY}: {error}", parameter=f"vllm_xargs.{BUDGET_KEY}", value=extra_args[BUDGET_KEY]
        ) from None


def context_tokens(extra_args: Mapping[str, Any] | None) -> int | None:
    """How much of its prompt a request's first path is decided from; None for all of it."""
    return (extra_args or {}).get(CONTEXT_TOKENS_KEY)


def verify_context(params: SamplingParams, num_prompt_tokens: int) -> None:
    """Raise vLLM's validation error, HTTP 400 in the server, if buddy_context_tokens is not within the prompt."""
    value = context_tokens(params.extra_args)
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= num_prompt_tokens:
        raise VLLMValidationError(
            f"{CONTEXT_TOKENS_KEY}: {value!r} is not an integer from 1 to {num_prompt_tokens}, the prompt's length",
            parameter=f"vllm_xargs.{CONTEXT_TOKENS_KEY}",
            value=value,
        )
