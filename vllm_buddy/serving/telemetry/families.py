"""The metrics `vllm_buddy:*`, and the form in which figures for them go from the scheduler to the API server."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

PREFIX = "vllm_buddy:"
BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0)
_SECONDS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)

# Name of a metric -> value of its own label ("" if it has none) -> figures since the last ones: what a counter grew
# by, what a gauge shows now, each observation of a histogram.
Figures = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Family:
    """One metric.

    name: without PREFIX. buckets: upper ends, of a histogram. label, values: a label beside those that vLLM's metrics
    have, with all values it can take, so that the number of series does not grow with requests; "" and ("",): none.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    buckets: tuple[float, ...] = ()
    label: str = ""
    values: tuple[str, ...] = ("",)


def families(num_layers: int, *, has_auto: bool, lossless: bool, objectives: Iterable[str] = ()) -> Iterator[Family]:
    """The metrics of a server. has_auto, lossless: whether it has budget "auto", and lossless mode.

    num_layers: of the model. objectives: names of the service objectives that the server keeps.
    """
    layers = tuple(float(n) for n in range(1, num_layers + 1))
    budgets = tuple(f"{end:g}" for end in BUDGETS)
    yield Family(
        "budget",
        "histogram",
        "Budget of finished requests; of one that was lowered, the share of layers its decoded tokens ran.",
        BUDGETS,
    )
    yield Family(
        "layers_executed", "histogram", "Mean number of layers executed per token, of finished requests.", layers
    )
    yield Family("step_layers", "histogram", "Layers that at least one token of a step ran, of each step.", layers)
    yield Family("routing_seconds", "histogram", "Time to route one arriving request or one step.", _SECONDS)
    yield Family("reroutes", "counter", "Changes of path within finished requests.")
    yield Family("decisions", "counter", "Routing decisions for finished requests.")
    yield Family("layer_tokens_executed", "counter", "Layers executed, summed over tokens.")
    yield Family(
        "layer_tokens_skipped",
        "counter",
        "Layers skipped, summed over tokens. Share skipped: this over the sum with layer_tokens_executed.",
    )
    yield Family(
        "prompt_tokens", "counter", "Tokens of prompts, by budget up to the label's.", label="budget", values=budgets
    )
    yield Family(
        "prompt_tokens_cached",
        "counter",
        "Of these, the tokens that were found in the prefix cache.",
        label="budget",
        values=budgets,
    )
    if has_auto:
        yield Family(
            "auto_budget",
            "histogram",
            "Budget of finished requests with budget auto; of lowered ones, the share of layers that they ran.",
            BUDGETS,
        )
        yield Family("auto_price", "gauge", "Price of compute, nats per token for all layers.")
        yield Family("load", "gauge", "Load that price or objectives follow, from 0 to 1.")
    if names := tuple(objectives):
        yield Family(
            "slo_objective_seconds",
            "gauge",
            "Service objective for the 99th percentile.",
            label="objective",
            values=names,
        )
        yield Family(
            "slo_observed_seconds",
            "gauge",
            "The 99th percentile of the last 30 seconds; NaN if nothing was observed.",
            label="objective",
            values=names,
        )
        yield Family(
            "slo_largest_budget", "gauge", "The largest budget that the service objectives leave to budget auto."
        )
        yield Family(
            "slo_unreachable", "gauge", "1 while a service objective is missed at the smallest budget, else 0."
        )
    if lossless:
        yield Family("depth_drafts", "counter", "Drafts made on the model's own layers, of those that steps checked.")
        yield Family("depth_drafts_accepted", "counter", "Those that all layers confirmed.")
        yield Family("layer_tokens_drafting", "counter", "Layers executed to make these drafts.")


def budget_label(budget: float) -> str:
    """The value of the label `budget` that counts a budget in (0, 1]: the least of BUDGETS that is not below it."""
    return f"{next(end for end in BUDGETS if end >= budget):g}"
