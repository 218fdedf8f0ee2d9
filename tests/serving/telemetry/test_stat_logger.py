"""The metrics `vllm_buddy:*`, from the scheduler through vLLM's statistics to what a scrape finds."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.harness.engine import Ask, Tiny
from tests.harness.pretend_worker import PretendEngine
from tests.harness.shown_metrics import ShownMetrics
from tests.harness.tiny_models import NUM_LAYERS, random_prompts
from vllm_buddy.method import PathSchedule
from vllm_buddy.serving.compat import add_figures, take_figures
from vllm_buddy.serving.telemetry.families import budget_label, families
from vllm_buddy.serving.telemetry.stat_logger import BuddyStatLogger

PROMPT = tuple(random_prompts(1, seed=7, min_tokens=50, max_tokens=60)[0])


def engine_of(tiny: Callable[[str], Tiny], *, asynchronous: bool = False) -> PretendEngine:
    return PretendEngine(tiny("llama"), PathSchedule(0), asynchronous=asynchronous, num_blocks=200, chunk=64)


def serve(engine: PretendEngine, *asks: Ask) -> None:
    for ask in asks:
        engine.add(ask)
    while not engine.idle:
        engine.step()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_figures_arrive_with_vllms_statistics(tiny: Callable[[str], Tiny], asynchronous: bool) -> None:
    """Fails if a figure is lost on the way to the front end, or vLLM's own loggers trip over what carries it."""
    engine = engine_of(tiny, asynchronous=asynchronous)
    shown = ShownMetrics(engine.config)
    serve(engine, Ask(PROMPT, 0.5, 8), Ask(PROMPT, 1.0, 8))
    routing_seconds, num_steps = engine.scheduler._metrics.routing_seconds, engine._num_steps
    shown.take(engine)
    assert (shown.value("budget_count"), shown.value("budget_sum")) == (2, 1.5)
    assert shown.value("budget_bucket", le="0.5") == 1
    assert shown.value("routing_seconds_sum") == pytest.approx(routing_seconds)
    assert shown.value("step_layers_bucket", le=str(float(NUM_LAYERS - 1))) == 0  # the union of both is the model
    assert 8 <= shown.value("step_layers_count") <= num_steps  # some steps at the end had no tokens
    assert shown.value("decisions_total") > 0


def test_hits_of_the_prefix_cache_are_counted_by_budget(tiny: Callable[[str], Tiny]) -> None:
    """Fails if cached tokens are counted for another budget, or twice."""
    engine = engine_of(tiny)
    shown = ShownMetrics(engine.config)
    for budget in (0.5, 0.5, 1.0):
        serve(engine, Ask(PROMPT, budget, 4))
    shown.take(engine)
    assert engine.cache_hits > 0
    assert shown.value("prompt_tokens_total", budget="0.5") == 2 * len(PROMPT)
    assert shown.value("prompt_tokens_cached_total", budget="0.5") == engine.cache_hits
    assert shown.value("prompt_tokens_total", budget="1") == len(PROMPT)
    assert shown.value("prompt_tokens_cached_total", budget="1") == 0


def test_engines_of_one_front_end_are_told_apart(tiny: Callable[[str], Tiny]) -> None:
    """Fails if data-parallel engines add up under one label, or count twice."""
    first, second = engine_of(tiny), engine_of(tiny)
    shown = ShownMetrics(first.config, engines=(0, 1))
    serve(first, Ask(PROMPT, 0.5, 4))
    serve(second, Ask(PROMPT, 1.0, 4), Ask(PROMPT, 1.0, 4))
    shown.take(first, 0)
    shown.take(second, 1)
    assert (shown.value("budget_count", 0), shown.value("budget_count", 1)) == (1, 2)


def test_a_second_engine_in_a_process_starts_at_zero(tiny: Callable[[str], Tiny]) -> None:
    """Fails if a process that starts an engine after another registers metrics twice, or goes on counting the first."""
    engine = engine_of(tiny)
    before, after = ShownMetrics(engine.config), ShownMetrics(engine.config)
    serve(engine, Ask(PROMPT, 0.5, 4))
    before.take(engine)
    assert after.value("budget_count") == 0
    serve(engine, Ask(PROMPT, 0.5, 4))
    after.take(engine)
    assert after.value("budget_count") == 1


def test_an_aborted_request_is_shown_by_an_idle_server(tiny: Callable[[str], Tiny]) -> None:
    """Fails if the figures of the last request wait in the engine until the next one comes."""
    from vllm.v1.request import RequestStatus

    engine = engine_of(tiny)
    shown = ShownMetrics(engine.config)
    engine.add(Ask(PROMPT, 0.5, 40))
    engine.step()
    engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    while not engine.idle:
        engine.step()
    shown.take(engine)
    assert shown.value("budget_count") == 1


def test_models_without_routing_have_vllms_loggers_only(tiny: Callable[[str], Tiny]) -> None:
    """Fails if the plugin shows metrics of, or takes statistics from, a server that did not ask for routing."""
    from vllm import EngineArgs

    config = EngineArgs(model=str(tiny("llama").folder), skip_tokenizer_init=True).create_engine_config()
    manager = ShownMetrics(config).manager
    assert not any(isinstance(logger, BuddyStatLogger) for logger in manager.stat_loggers)


def test_metrics_are_of_the_classes_of_vllms_own(tiny: Callable[[str], Tiny]) -> None:
    """Fails if under Ray Serve, where vLLM's metrics are Ray's, ours are left where nobody scrapes."""
    made: dict[str, dict[str, Any]] = {}

    class Recorded:
        def __init__(self, name: str, **about: Any) -> None:
            made[name] = about

        def labels(self, *values: str) -> "Recorded":
            return self

        def set(self, value: float) -> None: ...

    vllms: Any = SimpleNamespace(_counter_cls=Recorded, _gauge_cls=Recorded, _histogram_cls=Recorded)
    BuddyStatLogger(engine_of(tiny).config, [0], vllms)
    assert set(made) == {f"vllm_buddy:{f.name}" for f in families(NUM_LAYERS, has_auto=True, lossless=False)}
    assert made["vllm_buddy:prompt_tokens"]["labelnames"] == ["model_name", "engine", "budget"]


def test_other_statistics_stay() -> None:
    """Fails if what carries the figures takes a connector's statistics with it, or is left for vLLM to look into."""
    from vllm.v1.metrics.stats import SchedulerStats

    for connectors in (None, {"bytes": 3}):
        stats = SchedulerStats(kv_connector_stats=connectors)
        add_figures(stats, {"load": {"": [0.5]}})
        assert take_figures(stats) == {"load": {"": [0.5]}}
        assert stats.kv_connector_stats == connectors
        assert take_figures(stats) == {}
    assert take_figures(None) == {}


def test_every_budget_has_a_label() -> None:
    """Fails if a client's budget makes a series of its own, or none."""
    assert [budget_label(b) for b in (0.01, 0.1, 0.5, 0.51, 0.75, 1.0)] == ["0.1", "0.1", "0.5", "0.6", "0.75", "1"]
