"""Splits the time of an engine step into parts, by wrapping the functions that a running engine calls.

The plugin has no code for this. Attributes of the engine's objects, or of classes where no object can be reached, are
replaced while a block runs and put back afterwards.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from benchmarks.harness import engines
from benchmarks.harness.engines import Variant
from vllm_buddy.method import Context, TokenRoute
from vllm_buddy.serving.forward.bypasses import BypassCall, KVBypassCall
from vllm_buddy.serving.forward.eager import RoutedStep

REST = "rest"
PARTS = {
    "layers": "functions of layers",
    "bypass": "functions of bypasses",
    "gather": "rest of RoutedStep.run: rows gathered and scattered",
    "views": "views of the KV policy, their metadata, the forward context",
    "router": "Decision Module asked, context sums",
    "plan": "rest of the plugin's scheduling",
    "count": "layers counted, and metrics",
    "forward": "rest of the model: embedding and last norm; of stock vLLM all of it, which is one graph",
    "head": "compute_logits",
    "sampler": "sampling",
    "scheduler": "vLLM's own scheduling",
    REST: "input preparation, output processing, what was named nowhere",
}

# A function to time: an object or class, the name of its attribute, the part that its time counts as.
Place = tuple[Any, str, str]


class StepClock:
    """Charges every moment of a step to the innermost open part, or to REST, so that the parts sum to the step.

    steps: for each step, ms by part.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._open: list[str] = []
        self._ms = dict.fromkeys(PARTS, 0.0)
        self._last = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time within a step charged to `part`, except for parts that it opens itself."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._open:  # outside a step, for example when a request arrives
                return function(*args, **kwargs)
            self._charge()
            self._open.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._open.pop()

        return call

    def step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with each call measured as a step."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._ms = dict.fromkeys(PARTS, 0.0)
            self._last = time.perf_counter()
            self._open.append(REST)
            try:
                result = function(*args, **kwargs)
                self._charge()
            finally:
                self._open.clear()
            self.steps.append(self._ms)
            return result

        return call

    def _charge(self) -> None:
        now = time.perf_counter()
        self._ms[self._open[-1]] += (now - self._last) * 1e3
        self._last = now


@contextmanager
def instrumented(variant: Variant) -> Iterator[StepClock]:
    """Split the steps of the variant's engine while the block runs. No other variant may run in the block.

    Valid on CPU, where calls return when their work is done.
    """
    variant.prepare()  # sets the router, which is wrapped below
    clock = StepClock()
    places = _places_of_vllm(variant)
    if variant.path is None:
        places += _places_of_buddy(variant)
    with ExitStack() as stack:
        stack.enter_context(timed_at(clock, places))
        if variant.path is None:
            backbone = engines.backbone(variant.llm)
            functions = [clock.timed("layers", function) for function in backbone.functions]
            stack.enter_context(patch.object(backbone, "functions", functions))
        engine = variant.llm.llm_engine
        stack.enter_context(patch.object(engine, "step", clock.step(engine.step)))
        yield clock


@contextmanager
def timed_at(clock: StepClock, places: Sequence[Place]) -> Iterator[None]:
    """Let `clock` time all places while the block runs, and restore them even if it fails."""
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        yield


def _places_of_vllm(variant: Variant) -> list[Place]:
    runner = engines.model_runner(variant.llm)
    return [
        (Scheduler, "schedule", "scheduler"),
        (Scheduler, "update_from_output", "scheduler"),
        (GPUModelRunner, "_model_forward", "forward"),
        (runner.model, "compute_logits", "head"),
        (GPUModelRunner, "sample_tokens", REST),
        (runner, "_sample", "sampler"),
    ]


def _places_of_buddy(variant: Variant) -> list[Place]:
    """Return the plugin's places. In an overridden method of vLLM, only the time that the plugin adds is its part."""
    scheduler, runner = engines.core(variant.llm).scheduler, engines.model_runner(variant.llm)
    return [
        (scheduler, "schedule", "plan"),
        (scheduler._routes.router, "path", "router"),
        (Context, "extend", "router"),
        (TokenRoute, "decide", "router"),
        (scheduler, "update_from_output", "count"),
        (runner, "sample_tokens", "count"),
        (runner, "_model_forward", "views"),
        (RoutedStep, "_forward_context", "views"),
        (RoutedStep, "run", "gather"),
        (BypassCall, "__call__", "bypass"),
        (KVBypassCall, "__call__", "bypass"),
    ]
