"""What a server allows its requests, and which budget and depth a request therefore gets."""

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from vllm_buddy import __version__
from vllm_buddy.artifact import Artifact
from vllm_buddy.errors import BudgetError, SettingsError, shown
from vllm_buddy.method import LayerPath, depth_for_budget, parse_budget, runs_enough, smallest_budget
from vllm_buddy.method.budget import MIN_DEPTH
from vllm_buddy.serving.admission.auto_limits import AutoBudget, AutoLimits
from vllm_buddy.serving.admission.option_names import (
    AUTO_KEYS,
    AUTO_MAX_KEY,
    AUTO_MIN_KEY,
    BUDGET_KEY,
    BUDGET_MODE,
    FULL_PROMPT,
    LOSSLESS,
    MODE_KEY,
    PRICE_KEY,
    PROMPT_KEY,
    ROUTED_PROMPT,
)
from vllm_buddy.serving.admission.options import OptionError
from vllm_buddy.serving.start.setting_sections import AUTO
from vllm_buddy.serving.start.settings import BuddySettings


@dataclass(frozen=True)
class FixedBudget:
    """The budget of a request that names a number, or that names none where the server's default is a number.

    lossless: whether drafts on some layers are checked by all.
    """

    budget: float
    depth: int
    lossless: bool = False


@dataclass(frozen=True)
class RequestLimits:
    """What a server allows its requests. Attached to vLLM's ModelConfig at start (start/attached.py).

    min_budget, max_budget: of what a request may ask for.
    layers: those that the path of some request may hold; workers load no others.
    depths: depths that the path library holds; None if all are allowed. auto: None without a Budget Predictor.
    lossless: whether requests may ask for lossless mode. prompt: whether prompts of requests that do not say run their
        budget ("routed") or all layers ("full").
    """

    num_layers: int
    default_budget: float | Literal["auto"]
    min_budget: float
    max_budget: float
    layers: LayerPath
    depths: tuple[int, ...] | None = None
    auto: AutoLimits | None = None
    lossless: bool = False
    prompt: Literal["routed", "full"] = "routed"

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that gets vLLM's configuration from another one may not have loaded plugins: see `_restored`."""
        return _restored, (__version__, *(getattr(self, field.name) for field in fields(self)))

    @classmethod
    def from_settings(cls, settings: BuddySettings, artifact: Artifact, *, lossless: bool = False) -> "RequestLimits":
        """What the settings and the artifact allow. lossless: whether the server has the drafter for it.

        Raises:
            SettingsError, BudgetError: settings that contradict each other or the artifact; a default budget that no
                request could ask for.
        """
        num_layers = artifact.config.base_model.num_layers
        floor = smallest_budget(num_layers)
        if settings.min_budget is not None and not runs_enough(settings.min_budget, num_layers):
            raise SettingsError(
                f"min_budget {settings.min_budget:g} leaves fewer than {MIN_DEPTH} of {num_layers} layers; the "
                f"smallest budget is {floor:g}"
            )
        min_budget, max_budget = settings.min_budget or floor, settings.max_budget
        if max_budget < 1.0:
            _check_max_budget(settings, min_budget, lossless=lossless)
        default = settings.default_budget if "default_budget" in settings.model_fields_set else max_budget
        router = artifact.router(library=settings.library)
        depths = router.depths
        lowest, highest = (depth_for_budget(budget, num_layers) for budget in (min_budget, max_budget))
        limits = cls(
            num_layers=num_layers,
            default_budget=default,
            min_budget=min_budget,
            max_budget=max_budget,
            layers=router.reachable(range(lowest, highest + 1)),
            depths=None if depths is None else tuple(depths),
            auto=AutoLimits.from_settings(settings, artifact, min_budget),
            lossless=lossless,
            prompt=settings.prompt,
        )
        try:
            limits.resolve(None)
        except OptionError as error:
            raise SettingsError(f"default_budget: {error}; set default_budget to one that is allowed") from None
        return limits

    def resolve(self, extra_args: Mapping[str, Any] | None) -> FixedBudget | AutoBudget:
        """What a request with these options runs: its own budget, or the server's default.

        Raises:
            OptionError: a budget that is no number in (0, 1], below the floor, above the ceiling or of a depth the
                library lacks; "auto" without a Budget Predictor; options of "auto" out of range, or beside another
                budget; lossless mode without its drafter, or beside a budget below 1; an unknown kind of prompt,
                or one at full depth where the ceiling is below 1.
        """
        options = {key: value for key, value in (extra_args or {}).items() if value is not None}
        if self.full_prompt(extra_args):
            self._refuse_full_depth(PROMPT_KEY, f'a prompt that is "{FULL_PROMPT}"')
        mode = options.get(MODE_KEY, BUDGET_MODE)
        if not isinstance(mode, str) or mode not in (BUDGET_MODE, LOSSLESS):
            raise OptionError(MODE_KEY, f'mode is {shown(mode)}; allowed are "{BUDGET_MODE}" and "{LOSSLESS}"')
        if mode == LOSSLESS:
            return self._lossless(options)
        value = options.get(BUDGET_KEY, self.default_budget)
        if isinstance(value, str) and value == AUTO:
            return self._auto_budget(options)
        budget = self._fixed_budget(value)
        for key in AUTO_KEYS:
            if key in options:
                raise OptionError(
                    key, f'goes with budget "{AUTO}", but the budget is {budget.budget:g}; leave one of them out'
                )
        return budget

    def full_prompt(self, extra_args: Mapping[str, Any] | None) -> bool:
        """Whether the prompt of a request with these options runs all layers.

        Raises:
            OptionError: the option has another value than those that there are.
        """
        value = (extra_args or {}).get(PROMPT_KEY)
        if value is None:
            value = self.prompt
        if not isinstance(value, str) or value not in (ROUTED_PROMPT, FULL_PROMPT):
            raise OptionError(
                PROMPT_KEY, f'prompt is {shown(value)}; allowed are "{ROUTED_PROMPT}" and "{FULL_PROMPT}"'
            )
        return value == FULL_PROMPT

    def _lossless(self, options: Mapping[str, Any]) -> FixedBudget:
        if not self.lossless:
            raise OptionError(
                MODE_KEY,
                "lossless mode needs a server that drafts with the model's own layers; start it with "
                "`vllm-buddy serve --lossless-drafts N`",
            )
        clashing = [key for key in AUTO_KEYS if key in options]
        if BUDGET_KEY in options:
            value = options[BUDGET_KEY]
            is_auto = isinstance(value, str) and value == AUTO
            if is_auto or self._fixed_budget(value).budget < 1.0:
                clashing.insert(0, BUDGET_KEY)
        if clashing:
            key = clashing[0]
            told = f'is {shown(options[key])}, but mode "{LOSSLESS}" runs all layers; leave one of them out'
            raise OptionError(key, told)
        return FixedBudget(1.0, self.num_layers, lossless=True)

    def _refuse_full_depth(self, key: str, what: str) -> None:
        if self.max_budget < 1.0:
            raise OptionError(
                key, f"{what} runs all layers, but the largest budget that a request may ask for is {self.max_budget:g}"
            )

    def _fixed_budget(self, value: Any) -> FixedBudget:
        try:
            budget = parse_budget(value)
        except BudgetError as error:
            raise OptionError(BUDGET_KEY, f'{error} or "{AUTO}"' if self.auto else str(error)) from None
        # The smallest budget of all is a rounded number, below which there are others that run as many layers.
        is_set = self.min_budget > smallest_budget(self.num_layers)
        if budget < self.min_budget if is_set else not runs_enough(budget, self.num_layers):
            raise OptionError(BUDGET_KEY, f"budget {budget:g} is below the smallest allowed budget {self.min_budget:g}")
        if budget > self.max_budget:
            raise OptionError(
                BUDGET_KEY,
                f"budget {budget:g} is above the largest allowed budget {self.max_budget:g}; allowed are "
                f"{self.min_budget:g} to {self.max_budget:g}",
            )
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
            if not is_number or not 0 <= price <= sys.float_info.max:  # the comparison fails for NaN, too
                raise OptionError(PRICE_KEY, f"price is {shown(price)}; allowed is a finite number from 0 up")
            price = float(price) + 0.0  # -0.0 becomes 0.0
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


def _restored(version: str, *values: Any) -> RequestLimits:
    """Unpickle RequestLimits, and load vLLM's plugins, this one among them.

    version: of the package that pickled them, such as on the node where Ray makes the configuration.

    On a GPU, Ray Serve LLM makes the configuration in another process than the one that starts vLLM's client from it.
    vLLM loads plugins where it makes a configuration, so that the client would not check what requests ask for.

    Raises:
        SettingsError: this process has another version, whose limits may be others.
    """
    if version != __version__:
        raise SettingsError(
            f"the server was configured by vllm_buddy {version}, but {platform.node()} has {__version__}; install the "
            "same version of vllm-buddy on every node"
        )
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return RequestLimits(*values)


def _check_max_budget(settings: BuddySettings, min_budget: float, *, lossless: bool) -> None:
    """Raise SettingsError for what cannot be had below full depth."""
    largest = f"max_budget {settings.max_budget:g}"
    if settings.max_budget < min_budget:
        raise SettingsError(f"{largest} is below the smallest budget a request may ask for, {min_budget:g}")
    for asked, name in (
        (lossless, "lossless drafts, which all layers check"),
        (settings.prompt == FULL_PROMPT, f'prompt "{FULL_PROMPT}"'),
        (settings.schedule.by_token, 'schedule "token", under which single tokens may run all layers'),
    ):
        if asked:
            raise SettingsError(f"{largest} cannot be had with {name}; leave one of them out")
