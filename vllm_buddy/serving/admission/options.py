"""A request's own options: `vllm_xargs` over HTTP, `SamplingParams(extra_args=...)` offline."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_buddy.errors import BudgetError
from vllm_buddy.method import depth_for_budget, parse_budget
from vllm_buddy.serving.admission.chooser import AutoBudget, AutoLimits
from vllm_buddy.serving.start.settings import AUTO

BUDGET_KEY = "buddy_budget"
CONTEXT_TOKENS_KEY = "buddy_context_tokens"
PRICE_KEY = "buddy_price"
AUTO_MIN_KEY = "buddy_auto_min"
AUTO_MAX_KEY = "buddy_auto_max"
_AUTO_KEYS = (PRICE_KEY, AUTO_MIN_KEY, AUTO_MAX_KEY)
_KEYS = (BUDGET_KEY, CONTEXT_TOKENS_KEY, *_AUTO_KEYS)
_PREFIX = "buddy_"


class OptionError(BudgetError):
    """An option of a request that cannot be served. key: its name."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


@dataclass(frozen=True)
class FixedBudget:
    """The budget of a request that says a number, or of one that says nothing where the default is a number."""

    budget: float
    depth: int


@dataclass(frozen=True)
class RequestLimits:
    """What a server allows its requests. Set on vLLM's ModelConfig as `buddy_limits` at start.

    depths: depths that the path library holds; None if all are allowed. auto: None without a Budget Predictor.
    """

    num_layers: int
    default_budget: float | Literal["auto"]
    min_budget: float
    depths: tuple[int, ...] | None = None
    auto: AutoLimits | None = None

    def resolve(self, extra_args: Mapping[str, Any] | None) -> FixedBudget | AutoBudget:
        """What a request is to run: its own budget, or the server's default.

        Raises:
            OptionError: a budget that is no number in (0, 1], below the floor or of a depth the library lacks; "auto"
                without a Budget Predictor; options of "auto" out of range, or beside another budget.
        """
        options = {key: value for key, value in (extra_args or {}).items() if value is not None}
        value = options.get(BUDGET_KEY, self.default_budget)
        if isinstance(value, str) and value == AUTO:
            return self._auto_budget(options)
        budget = self._fixed_budget(value)
        for key in _AUTO_KEYS:
            if key in options:
                raise OptionError(
                    key, f'goes with budget "{AUTO}", but the budget is {budget.budget:g}; leave one of them out'
                )
        return budget

    def _fixed_budget(self, value: Any) -> FixedBudget:
        try:
            budget = parse_budget(value)
        except BudgetError as error:
            raise OptionError(BUDGET_KEY, f'{error} or "{AUTO}"' if self.auto else str(error)) from None
        if budget < self.min_budget:
            raise OptionError(BUDGET_KEY, f"budget {budget:g} is below the smallest allowed budget {self.min_budget:g}")
        depth = depth_for_budget(budget, self.num_layers)
        if self.depths is not None and depth != self.num_layers and depth not in self.depths:
            allowed = ", ".join(str(d) for d in (*self.depths, self.num_layers))
            raise OptionError(
                BUDGET_KEY,
                f"budget {budget:g} is {depth} of {self.num_layers} layers, for which the path library has no path; "
                f"it has paths of {allowed} layers",
            )
        return FixedBudget(budget, depth)

    def _auto_budget(self, options: Mapping[str, Any]) -> AutoBudget:
        if self.auto is None:
            raise OptionError(
                BUDGET_KEY,
                f'budget is "{AUTO}", but the server\'s artifact has no Budget Predictor; send a number in (0, 1], or '
                "serve an artifact that has one, which `vllm-buddy train-budget` makes",
            )
        price = options.get(PRICE_KEY)
        if price is not None:
            is_number = isinstance(price, (int, float)) and not isinstance(price, bool)
            if not is_number or not 0 <= price <= sys.float_info.max:  # NaN is not, either
                raise OptionError(PRICE_KEY, f"price is {price!r}; allowed is a finite number from 0 up")
            price = float(price)
        ends = {key: self._end(key, options[key]) for key in (AUTO_MIN_KEY, AUTO_MAX_KEY) if key in options}
        try:
            return self.auto.budget(price, ends.get(AUTO_MIN_KEY), ends.get(AUTO_MAX_KEY))
        except BudgetError as error:
            raise OptionError(next(iter(ends), BUDGET_KEY), str(error)) from None

    def _end(self, key: str, value: Any) -> float:
        """One end of the range that a request gives to "auto"."""
        assert self.auto is not None
        try:
            budget = parse_budget(value)
        except BudgetError as error:
            raise OptionError(key, str(error)) from None
        if not self.auto.smallest <= budget <= self.auto.largest:
            raise OptionError(
                key,
                f'budget {budget:g} lies outside what the server lets "{AUTO}" choose, '
                f"{self.auto.smallest:g} to {self.auto.largest:g}",
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
        model_config.buddy_limits.resolve(extra_args)
    except OptionError as error:
        raise VLLMValidationError(
            f"{error.key}: {error}", parameter=f"vllm_xargs.{error.key}", value=extra_args.get(error.key)
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
