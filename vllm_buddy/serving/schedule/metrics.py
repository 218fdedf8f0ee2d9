"""What the scheduler counts for the metrics `vllm_buddy:*`, until vLLM's statistics of the step take it along.

The scheduler's process counts and the API server's process is scraped (`telemetry/stat_logger.py`).
"""

import time
from collections.abc import Iterable
from functools import reduce
from operator import or_

from vllm_buddy.method import Route
from vllm_buddy.serving.admission.slo import Objectives
from vllm_buddy.serving.schedule.outcome import Outcome
from vllm_buddy.serving.schedule.plan import Executed, StepPlan
from vllm_buddy.serving.telemetry.families import Figures, budget_label


class Stopwatch:
    """Adds up the time spent within `with` blocks, once where one stands in another. seconds: so far."""

    __slots__ = ("_depth", "_started", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._started = 0.0

    def __enter__(self) -> None:
        if self._depth == 0:
            self._started = time.perf_counter()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._started


class EngineMetrics:
    """Figures of one engine since they were last taken.

    collects: whether somebody takes them; vLLM has no statistics with `--disable-log-stats`.
    """

    def __init__(self, *, collects: bool) -> None:
        self._collects = collects
        self._figures: Figures = {}
        self.routing_seconds = 0.0  # total, read by benchmarks

    def observe_request(self, outcome: Outcome, route: Route, num_layers: int) -> None:
        """Count a request that has ended, whether it finished or was aborted. num_layers: of the model."""
        budget = outcome.budget_in_effect(route, num_layers)
        self._observe("budget", budget)
        if outcome.price is not None:
            self._observe("auto_budget", budget)
        if outcome.mean_layers is not None:
            self._observe("layers_executed", outcome.mean_layers)
        self._count("reroutes", route.num_reroutes)
        self._count("decisions", route.num_decisions)

    def observe_prompt(self, budget: float, num_tokens: int, num_cached: int) -> None:
        """Count the tokens of a prompt that is scheduled for the first time. num_cached: found in the prefix cache."""
        self._count("prompt_tokens", num_tokens, budget_label(budget))
        self._count("prompt_tokens_cached", num_cached, budget_label(budget))

    def observe_routing(self, seconds: float) -> None:
        """Count the time that routing one arriving request, or one step, took."""
        self._observe("routing_seconds", seconds)
        self.routing_seconds += seconds

    def show_load(self, level: float, price: float) -> None:
        """Set the level of load and the price of budget "auto" that it leads to."""
        self._set("load", level)
        self._set("auto_price", price)

    def show_objectives(self, objectives: Objectives, largest_budget: float) -> None:
        """Set what was observed of the service objectives, what they leave, and whether one is out of reach."""
        for name, seconds in objectives.observed_s.items():
            self._set("slo_observed_seconds", seconds, name)
        self._set("slo_largest_budget", largest_budget)
        self._set("slo_unreachable", float(objectives.unreachable))

    def observe_drafts(self, counts: Executed, num_accepted: int | None) -> None:
        """Count the layers that drafted for a request, and those of its drafts that a step checked.

        num_accepted: of these; None if they were not made on layers.
        """
        self._count("layer_tokens_drafting", counts.drafting)
        if num_accepted is not None:
            self._count("depth_drafts", len(counts.drafts))
            self._count("depth_drafts_accepted", num_accepted)

    def observe_plan(self, plan: StepPlan) -> None:
        """Count the layers that at least one token of a step runs: a batch pays for the union of its paths."""
        if self._collects:
            union = reduce(or_, (run.path for request in plan.values() for run in request.runs))
            self._observe("step_layers", union.bit_count())

    def observe_step(self, executed: Iterable[Executed], num_layers: int) -> None:
        """Count one step's layer executions, those of drafts included."""
        total = tokens = 0
        for counts in executed:
            total += counts.total + sum(counts.drafts)
            tokens += counts.num_tokens + len(counts.drafts)
        self._count("layer_tokens_executed", total)
        self._count("layer_tokens_skipped", tokens * num_layers - total)

    def take(self) -> Figures:
        """The figures since the last call."""
        taken, self._figures = self._figures, {}
        return taken

    def _count(self, name: str, amount: float, label: str = "") -> None:
        if self._collects and amount:
            figures = self._of(name, label)
            figures[:] = [sum(figures) + amount]

    def _set(self, name: str, value: float, label: str = "") -> None:
        if self._collects:
            self._of(name, label)[:] = [value]

    def _observe(self, name: str, value: float) -> None:
        if self._collects:
            self._of(name).append(value)

    def _of(self, name: str, label: str = "") -> list[float]:
        return self._figures.setdefault(name, {}).setdefault(label, [])
