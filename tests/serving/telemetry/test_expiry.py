"""What was observed is not shown for ever after the last step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.harness.engine import Tiny
from tests.harness.server_config import configure
from tests.harness.shown_metrics import ShownMetrics
from vllm_buddy.serving.admission.slo import WINDOW_S
from vllm_buddy.serving.compat import add_figures
from vllm_buddy.serving.telemetry import stat_logger
from vllm_buddy.serving.telemetry.expiry import Expiry

AFTER_S = 30.0


@dataclass
class Clock:
    """Time that a test moves on, with the timers that wait for it."""

    now: float = 100.0
    waiting: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def timer(self, seconds: float, function: Callable[[], None]) -> None:
        self.waiting.append((self.now + seconds, function))

    def go_on(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [entry for entry in self.waiting if entry[0] <= end]:
            entry = min(due, key=lambda one: one[0])
            self.waiting.remove(entry)
            self.now = entry[0]
            entry[1]()
        self.now = end


def test_it_expires_once_after_the_last_time() -> None:
    """Fails if a server at work forgets, an idle one does not, or each step starts a timer."""
    clock, expired = Clock(), []
    expiry = Expiry(AFTER_S, lambda: expired.append(clock.now), clock.timer, lambda: clock.now)
    for _ in range(100):
        expiry.seen()
        clock.go_on(1.0)
        assert len(clock.waiting) == 1
    assert expired == []
    clock.go_on(1000.0)
    assert expired == [199.0 + AFTER_S]
    assert clock.waiting == []
    expiry.seen()
    clock.go_on(1000.0)
    assert len(expired) == 2


def test_an_idle_engine_shows_no_latency(tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a server shows for hours what its last requests waited, or one engine's idleness hides another."""
    from vllm.v1.metrics.stats import SchedulerStats

    clock = Clock()

    def expiry(after_s: float, expired: Callable[[], None]) -> Expiry:
        return Expiry(after_s, expired, clock.timer, lambda: clock.now)

    monkeypatch.setattr(stat_logger, "Expiry", expiry)
    config = configure(tiny("llama"), {"slo": {"itl_ms": 50, "ttft_ms": 500}})
    shown = ShownMetrics(config, engines=(0, 1))

    def step(engine: int, **observed_s: float) -> None:
        stats: Any = SchedulerStats()
        add_figures(stats, {"slo_observed_seconds": {name: [seconds] for name, seconds in observed_s.items()}})
        shown.manager.record(stats, None, engine_idx=engine)

    def observed(engine: int) -> list[float | None]:
        return [shown.value("slo_observed_seconds", engine, objective=name) for name in ("itl", "ttft")]

    step(0, itl=0.02, ttft=0.3)
    clock.go_on(WINDOW_S / 2)
    step(1, itl=0.04, ttft=0.4)
    assert (observed(0), observed(1)) == ([0.02, 0.3], [0.04, 0.4])
    clock.go_on(WINDOW_S / 2)
    assert all(math.isnan(seconds or 0.0) for seconds in observed(0))
    assert observed(1) == [0.04, 0.4]
    assert shown.value("slo_objective_seconds", 0, objective="itl") == 0.05
    step(0, itl=0.01, ttft=0.2)
    assert observed(0) == [0.01, 0.2]
