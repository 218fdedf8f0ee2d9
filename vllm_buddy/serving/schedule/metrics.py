"""The `vllm_buddy:*` metrics, from the scheduler's process to the API server's /metrics.

The scheduler's process measures and the API server's process is scraped. The first writes its metrics to a file in
Prometheus' text format, at most once a second and when it runs out of work. The second reads the files on a scrape.
"""

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from vllm_buddy.method import Route
from vllm_buddy.serving.admission.slo import Objectives
from vllm_buddy.serving.schedule.outcome import Outcome
from vllm_buddy.serving.schedule.plan import Executed

if TYPE_CHECKING:
    from vllm.config import VllmConfig

METRICS_DIR_VARIABLE = "VLLM_BUDDY_METRICS_DIR"
_EXPORT_INTERVAL_S = 1.0
_BUDGET_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0)
_SECONDS_BUCKETS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)


class EngineMetrics:
    """The metrics of one engine, in a registry of their own.

    has_auto, lossless: whether to include those of budget "auto" and of lossless mode. objectives_s: the service
    objectives by name, in seconds.
    """

    def __init__(
        self,
        num_layers: int,
        engine: int,
        export_to: Path | None,
        *,
        has_auto: bool,
        lossless: bool = False,
        objectives_s: Mapping[str, float] | None = None,
    ) -> None:
        self._registry = CollectorRegistry()
        self._export_to = export_to
        self._engine = engine
        self._next_export = 0.0
        self.routing_seconds = 0.0  # total, read by benchmarks
        layers = [float(n) for n in range(1, num_layers + 1)]
        self._budget = self._histogram("budget", "Budget of finished requests.", _BUDGET_BUCKETS, engine)
        self._layers = self._histogram(
            "layers_executed", "Mean number of layers executed per token, of finished requests.", layers, engine
        )
        self._routing = self._histogram(
            "routing_seconds", "Time to route one arriving request or one step.", _SECONDS_BUCKETS, engine
        )
        self._reroutes = self._counter("reroutes", "Changes of path within finished requests.", engine)
        self._decisions = self._counter("decisions", "Routing decisions for finished requests.", engine)
        self._executed = self._counter("layer_tokens_executed", "Layers executed, summed over tokens.", engine)
        self._skipped = self._counter(
            "layer_tokens_skipped",
            "Layers skipped, summed over tokens. Share skipped: this over the sum with layer_tokens_executed.",
            engine,
        )
        if has_auto:
            self._auto_budget = self._histogram(
                "auto_budget", "Budget that was chosen for finished requests.", _BUDGET_BUCKETS, engine
            )
            self._auto_price = self._gauge("auto_price", "Price of compute, nats per token for all layers.", engine)
            self._load = self._gauge("load", "Load that the price follows, from 0 to 1.", engine)
        if objectives_s:
            self._unreachable = self._gauge(
                "slo_unreachable", "1 while a service objective is missed at the smallest budget, else 0.", engine
            )
            objective = self._gauges("slo_objective_seconds", "Service objective for the 99th percentile.")
            self._observed = self._gauges(
                "slo_observed_seconds", "The 99th percentile of the last 30 seconds; NaN if nothing was observed."
            )
            for name, seconds in objectives_s.items():
                objective.labels(engine, name).set(seconds)
        if lossless:
            self._depth_drafted = self._counter("depth_drafts", "Drafts made on the model's own layers.", engine)
            self._drafting = self._counter("layer_tokens_drafting", "Layers executed to make these drafts.", engine)
            self._depth_accepted = self._counter("depth_drafts_accepted", "Those that all layers confirmed.", engine)

    @classmethod
    def for_engine(cls, vllm_config: "VllmConfig") -> "EngineMetrics":
        """Metrics of this engine core process, exported where the API server asked for them."""
        engine = vllm_config.parallel_config.data_parallel_index
        folder = os.environ.get(METRICS_DIR_VARIABLE)
        # With several API servers vLLM collects the metrics of all processes itself (PROMETHEUS_MULTIPROC_DIR).
        export_to = Path(folder) / f"engine-{engine}.prom" if folder and not _multiprocess() else None
        limits = vllm_config.model_config.buddy_limits
        return cls(
            limits.num_layers,
            engine,
            export_to,
            has_auto=limits.auto is not None,
            lossless=limits.lossless,
            objectives_s=None if limits.auto is None else limits.auto.objectives_s,
        )

    def observe_request(self, outcome: Outcome, route: Route) -> None:
        """Count a request that has ended, whether it finished or was aborted."""
        self._budget.observe(outcome.budget)
        if outcome.price is not None:
            self._auto_budget.observe(outcome.budget)
        if outcome.mean_layers is not None:
            self._layers.observe(outcome.mean_layers)
        self._reroutes.inc(route.num_reroutes)
        self._decisions.inc(route.num_decisions)

    def observe_routing(self, seconds: float) -> None:
        """Count the time that routing one arriving request, or one step, took."""
        self._routing.observe(seconds)
        self.routing_seconds += seconds

    def show_load(self, level: float, price: float) -> None:
        """Set the level of load and the price of budget "auto" that it leads to."""
        self._load.set(level)
        self._auto_price.set(price)

    def show_objectives(self, objectives: Objectives) -> None:
        """Set what was observed of the service objectives, and whether one is out of reach."""
        for name, seconds in objectives.observed_s.items():
            self._observed.labels(self._engine, name).set(seconds)
        self._unreachable.set(objectives.unreachable)

    def observe_drafts(self, counts: Executed, num_accepted: int | None) -> None:
        """Count the layers that drafted for a request, and those of its drafts that a step checked.

        num_accepted: of these; None if they were not made on layers.
        """
        self._drafting.inc(counts.drafting)
        if num_accepted is not None:
            self._depth_drafted.inc(len(counts.drafts))
            self._depth_accepted.inc(num_accepted)

    def observe_step(self, executed: Iterable[Executed], num_layers: int) -> None:
        """Count one step's layer executions, those of drafts included."""
        total = tokens = 0
        for counts in executed:
            total += counts.total + sum(counts.drafts)
            tokens += counts.num_tokens + len(counts.drafts)
        self._executed.inc(total)
        self._skipped.inc(tokens * num_layers - total)

    def export(self, *, idle: bool) -> None:
        """Write the file for the API server's process, at most once a second unless the engine is idle."""
        if self._export_to is None or (time.monotonic() < self._next_export and not idle):
            return
        self._next_export = time.monotonic() + _EXPORT_INTERVAL_S
        partial = self._export_to.with_suffix(f".{os.getpid()}.tmp")
        try:
            partial.write_bytes(generate_latest(self._registry))
            partial.replace(self._export_to)
        except OSError:
            if partial.parent.is_dir():  # the disk may be full now and not in a second
                partial.unlink(missing_ok=True)
            else:  # the API server has ended and removed it
                self._export_to = None

    def _counter(self, name: str, description: str, engine: int) -> Counter:
        return Counter(f"vllm_buddy:{name}", description, ["engine"], registry=self._registry).labels(engine)

    def _gauge(self, name: str, description: str, engine: int) -> Gauge:
        return Gauge(
            f"vllm_buddy:{name}", description, ["engine"], registry=self._registry, multiprocess_mode="mostrecent"
        ).labels(engine)

    def _gauges(self, name: str, description: str) -> Gauge:
        """One for each service objective."""
        labels = ["engine", "objective"]
        return Gauge(f"vllm_buddy:{name}", description, labels, registry=self._registry, multiprocess_mode="mostrecent")

    def _histogram(self, name: str, description: str, buckets: Iterable[float], engine: int) -> Histogram:
        return Histogram(
            f"vllm_buddy:{name}", description, ["engine"], registry=self._registry, buckets=tuple(buckets)
        ).labels(engine)


class _EngineFiles(Collector):
    """Reads the files of all engines on each scrape."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Any]:
        families: dict[str, Any] = {}
        for path in sorted(self._folder.glob("*.prom")):
            for family in text_string_to_metric_families(path.read_text()):
                if family.name in families:
                    families[family.name].samples.extend(family.samples)
                else:
                    families[family.name] = family
        yield from families.values()


def export_from_this_process(instance_id: str) -> None:
    """Let this process, which serves /metrics, collect the metrics of the engines that it is about to start."""
    if _multiprocess():
        return
    folder = Path(tempfile.mkdtemp(prefix=f"vllm_buddy-{instance_id}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[METRICS_DIR_VARIABLE] = str(folder)
    REGISTRY.register(_EngineFiles(folder))


def _multiprocess() -> bool:
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ
