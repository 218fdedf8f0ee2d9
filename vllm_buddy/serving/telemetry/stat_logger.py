"""Shows the scheduler's figures among vLLM's own metrics: in the front end's process, with the same labels.

vLLM sends statistics with the outputs of a step (`SchedulerStats` in `EngineCoreOutputs`) from the process of each
engine, on this machine or another, to one of its API servers, and gives them there to its stat loggers. This is one.
"""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, PrometheusStatLogger

from vllm_buddy.serving.admission.slo import WINDOW_S
from vllm_buddy.serving.compat import take_figures
from vllm_buddy.serving.start.attached import limits_of
from vllm_buddy.serving.telemetry.expiry import Expiry
from vllm_buddy.serving.telemetry.families import PREFIX, Family, families

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import SchedulerStats

_LABELS = ["model_name", "engine"]  # of vLLM's metrics


class BuddyStatLogger(AggregateStatLoggerBase):
    """Records the figures of all engines of one front end in the metrics `vllm_buddy:*`.

    vllms: the stat logger behind vLLM's own metrics. Ours are of the same classes, so that they are found in the same
        place: in the registry of prometheus_client, or under Ray Serve among Ray's metrics.
    """

    def __init__(self, vllm_config: "VllmConfig", engine_indexes: list[int], vllms: PrometheusStatLogger) -> None:
        limits = limits_of(vllm_config.model_config)
        objectives_s = {} if limits.auto is None else limits.auto.objectives_s
        self._model_name = vllm_config.model_config.served_model_name
        self._families = {
            family.name: family
            for family in families(
                limits.num_layers, has_auto=limits.auto is not None, lossless=limits.lossless, objectives=objectives_s
            )
        }
        _unregister()
        self._metrics = {family.name: _metric(family, vllms) for family in self._families.values()}
        self._series: dict[tuple[str, str, int], Any] = {
            (family.name, value, engine): self._labelled(family, value, engine)
            for family in self._families.values()
            for value in family.values
            for engine in engine_indexes
        }
        if limits.auto is not None:
            for engine in engine_indexes:
                self._series["auto_price", "", engine].set(limits.auto.price)  # without load
                if objectives_s:
                    self._series["slo_largest_budget", "", engine].set(limits.auto.largest)
        self._expiry: dict[int, Expiry] = {}  # of what an engine observed, where it has service objectives
        for name, seconds in objectives_s.items():
            for engine in engine_indexes:
                self._series["slo_objective_seconds", name, engine].set(seconds)
                self._expiry[engine] = Expiry(WINDOW_S, partial(self._forget_observed, engine))
        for engine in self._expiry:
            self._forget_observed(engine)

    def record(
        self,
        scheduler_stats: "SchedulerStats | None",
        iteration_stats: Any,  # noqa: ARG002 - vLLM's interface
        mm_cache_stats: Any = None,  # noqa: ARG002
        engine_idx: int = 0,
    ) -> None:
        """Take the figures out of the statistics and add them to the metrics of that engine."""
        taken = take_figures(scheduler_stats)
        if taken and engine_idx in self._expiry:
            self._expiry[engine_idx].seen()
        for name, by_label in taken.items():
            for value, figures in by_label.items():
                series, kind = self._series[name, value, engine_idx], self._families[name].kind
                for figure in figures:
                    if kind == "counter":
                        series.inc(figure)
                    elif kind == "gauge":
                        series.set(figure)
                    else:
                        series.observe(figure)

    def _forget_observed(self, engine: int) -> None:
        """Show that nothing was observed of the service objectives in the last WINDOW_S seconds."""
        for value in self._families["slo_observed_seconds"].values:
            self._series["slo_observed_seconds", value, engine].set(math.nan)

    def log_engine_initialized(self) -> None:
        """Nothing to log."""

    def _labelled(self, family: Family, value: str, engine: int) -> Any:
        own = (value,) if family.label else ()
        return self._metrics[family.name].labels(self._model_name, str(engine), *own)


def _metric(family: Family, vllms: PrometheusStatLogger) -> Any:
    about = {
        "name": PREFIX + family.name,
        "documentation": family.description,
        "labelnames": [*_LABELS, *([family.label] if family.label else [])],
    }
    if family.kind == "counter":
        return vllms._counter_cls(**about)
    if family.kind == "gauge":
        return vllms._gauge_cls(**about, multiprocess_mode="mostrecent")
    return vllms._histogram_cls(**about, buckets=list(family.buckets))


def _unregister() -> None:
    """Forget the metrics of an engine that this process started before, as vLLM does with its own."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(PREFIX):
            REGISTRY.unregister(collector)
