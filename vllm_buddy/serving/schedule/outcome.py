"""What one request got: its budget, and the layers that its tokens executed, for the final response."""

from collections.abc import Iterable, Mapping
from typing import Any

from vllm_buddy.method import LayerPath, Route, Run, layers_of
from vllm_buddy.serving.admission.option_names import OUTCOME_KEY
from vllm_buddy.serving.schedule.plan import Executed

_WHOLE = "mode"  # a key that an outcome has, and paths that are told before it have not


def described(runs: Iterable[Run], num_layers: int) -> dict[str, Any]:
    """The form that runs have in a response: `layers`, the paths that occur, and `runs`, [tokens, index of a path].

    num_layers: of the model.
    """
    index: dict[LayerPath, int] = {}
    pairs = [[run.num_tokens, index.setdefault(run.path, len(index))] for run in runs]
    return {"num_layers": num_layers, "layers": [layers_of(path) for path in index], "runs": pairs}


class _Part:
    """The layers that the tokens of the prompt, or those after it, executed."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._total = 0

    def add(self, num_tokens: int, total: int) -> None:
        self._num_tokens += num_tokens
        self._total += total

    @property
    def mean_layers(self) -> float | None:
        """Layers executed per token; None before the first token."""
        return self._total / self._num_tokens if self._num_tokens else None

    def as_dict(self) -> dict[str, Any]:
        return {"tokens": self._num_tokens, "layers_executed_mean": self.mean_layers}


class Outcome:
    """A request's budget and depth, and the layers that its tokens executed as counted in the engine.

    price: the one at which budget "auto" was decided on arrival; None if the budget was given as a number.
    lossless: whether it runs in lossless mode.
    """

    def __init__(self, budget: float, depth: int, price: float | None = None, *, lossless: bool = False) -> None:
        self.lossless = lossless
        self.budget = budget
        self.depth = depth
        self.price = price
        self.num_tokens = 0
        self._total = 0
        self._fewest: int | None = None
        self._most: int | None = None
        self.num_drafted = 0
        self.num_accepted = 0
        self._drafting_total = 0
        self._prompt, self._decoded = _Part(), _Part()

    def add(self, executed: Executed, num_accepted: int = 0) -> None:
        """Count one step's tokens, of its drafts the first num_accepted."""
        accepted, rejected = executed.drafts[:num_accepted], executed.drafts[num_accepted:]
        self.num_tokens += executed.num_tokens + len(accepted)
        self._total += executed.total + sum(accepted)
        fewest, most = min((executed.fewest, *accepted)), max((executed.most, *accepted))
        self._fewest = fewest if self._fewest is None else min(self._fewest, fewest)
        self._most = most if self._most is None else max(self._most, most)
        self._prompt.add(executed.prompt_tokens, executed.prompt_total)
        self._decoded.add(
            executed.num_tokens - executed.prompt_tokens + len(accepted),
            executed.total - executed.prompt_total + sum(accepted),
        )
        self.num_drafted += len(executed.drafts)
        self.num_accepted += len(accepted)
        self._drafting_total += sum(rejected) + executed.drafting

    @property
    def mean_drafting_layers(self) -> float | None:
        """Layers executed to make drafts, and for drafts that were rejected, per token; None before the first token."""
        return self._drafting_total / self.num_tokens if self.num_tokens else None

    @property
    def mean_layers(self) -> float | None:
        """Layers executed per token; None before the first token."""
        return self._total / self.num_tokens if self.num_tokens else None

    def budget_in_effect(self, route: Route, num_layers: int) -> float:
        """The budget; of a request that was lowered, the share of the model's layers that its decoded tokens ran."""
        decoded = self._decoded.mean_layers
        return decoded / num_layers if route.lowered and decoded is not None else self.budget

    def as_dict(self, route: Route) -> dict[str, Any]:
        """The form it has in the response, under kv_transfer_params["buddy"]."""
        return {
            "mode": "lossless" if self.lossless else "budget",
            "budget": self.budget,
            "depth": self.depth,
            "auto": self.price is not None,
            "price": self.price,
            "lowered_to": route.depth if route.lowered else None,
            "layers_executed_mean": self.mean_layers,
            "layers_executed_min": self._fewest,
            "layers_executed_max": self._most,
            "tokens": self.num_tokens,
            "drafted": self.num_drafted,
            "accepted": self.num_accepted,
            "layers_drafting_mean": self.mean_drafting_layers,
            "prompt": self._prompt.as_dict(),
            "decoded": self._decoded.as_dict(),
            "distinct_paths": len(route.distinct_paths()),
            "reroutes": route.num_reroutes,
        }


def is_outcome(params: Mapping[str, Any] | None) -> bool:
    """Whether kv_transfer_params have the outcome of a request that has ended, not only paths of some of its tokens."""
    return _WHOLE in (params or {}).get(OUTCOME_KEY, ())


def joined(
    before: Mapping[str, Any] | None, later: Mapping[str, Any] | None, *, same_sample: bool = True
) -> Mapping[str, Any] | None:
    """The kv_transfer_params of two outputs that vLLM makes one of.

    Paths are told of the tokens since the last output, so those of both are put together. An outcome tells all paths.
    same_sample: whether both outputs are of one sample of the request; else paths of the later one are told.
    """
    told, more = ((params or {}).get(OUTCOME_KEY) for params in (before, later))
    if told is None or is_outcome(later):
        return later
    if more is None or is_outcome(before):
        return {**(later or {}), OUTCOME_KEY: told}
    if not same_sample:
        return later
    first, second = told["paths"], more["paths"]
    layers = [*first["layers"], *(own for own in second["layers"] if own not in first["layers"])]
    runs = [[num_tokens, layers.index(second["layers"][index])] for num_tokens, index in second["runs"]]
    return {**(later or {}), OUTCOME_KEY: {"paths": {**first, "layers": layers, "runs": [*first["runs"], *runs]}}}


def with_samples(params: Mapping[str, Any] | None, outcomes: Mapping[int, Any], num_samples: int) -> dict[str, Any]:
    """The kv_transfer_params of a response with several samples: the outcome of the first, and those of all.

    outcomes: by number of the sample. One that ended with a stop string has none, and is None in the list.
    """
    samples = [outcomes.get(number) for number in range(num_samples)]
    first = next(outcome for outcome in samples if outcome is not None)
    return {**(params or {}), OUTCOME_KEY: {**first, "samples": samples}}
