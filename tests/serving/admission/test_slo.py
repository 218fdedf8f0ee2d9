"""Service objectives: the level that keeps them, alone and in a simulated server."""

import logging
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from vllm_buddy.serving.admission import slo as module
from vllm_buddy.serving.admission.latency import FirstToken, Latencies
from vllm_buddy.serving.admission.slo import BEYOND, QUANTILE, STEP, WINDOW_S, Objectives, Percentile

STEP_S = 0.02


class Drive:
    """Objectives, and a clock that goes on by a step for each observation."""

    def __init__(self, **objective_s: float) -> None:
        self.objectives = Objectives(objective_s)
        self.now = 0.0

    def itl(self, seconds: float, rows: int = 4, steps: int = 1) -> float:
        """Take in steps after which all rows got a token."""
        for _ in range(steps):
            self.now += STEP_S
            self.objectives.observe(Latencies(self.now, itls=Counter({seconds: rows})))
        return self.objectives.level

    def first(self, waited_s: float, prefill_s: float) -> float:
        self.now += STEP_S
        return self.objectives.observe(Latencies(self.now, first_tokens=[FirstToken(waited_s, prefill_s)]))

    def wait(self, wait_s: float) -> float:
        self.now += STEP_S
        return self.objectives.observe(Latencies(self.now, wait_s=wait_s))

    def idle(self, seconds: float = 0.0) -> float:
        level = self.objectives.observe(Latencies(self.now), idle=True)
        self.now += seconds
        return level


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What is logged."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    module.logger.addHandler(handler)
    level = module.logger.level
    module.logger.setLevel(logging.INFO)
    yield messages
    module.logger.removeHandler(handler)
    module.logger.setLevel(level)


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_the_level_rests_where_the_percentile_is_the_objective(noise: float) -> None:
    """Fails if noise moves the level off the depth at which 1% of samples are above, to either side."""
    drive, generator = Drive(itl=1.0), np.random.default_rng(5)
    above = levels = 0.0
    count = 12_000
    for step in range(2 * count):
        level = drive.objectives.level
        drive.itl(seconds := (2.2 - 1.8 * level) * math.exp(noise * generator.standard_normal()))
        if step >= count:
            above += seconds > 1
            levels += level
    assert above / count <= (1 - QUANTILE) * 1.1
    # Where the 99th percentile would be the objective, were the level to stand still there.
    still = (2.2 - math.exp(-noise * 2.326)) / 1.8
    assert still - 0.02 < levels / count < still + 2 * STEP


def test_little_is_wound_up_beyond_the_ends() -> None:
    """Fails if a long overload has to be undone before the level falls, or a long calm before it rises."""
    drive = Drive(itl=1.0)
    assert drive.itl(2.0, steps=1000) == 1
    paid = round(BEYOND / STEP * QUANTILE / (1 - QUANTILE))
    assert drive.itl(0.5, steps=paid - 1) == 1
    assert drive.itl(0.5, steps=2) < 1
    drive.itl(0.5, steps=5000)
    assert drive.objectives.level == 0
    assert drive.itl(2.0) == pytest.approx(STEP, rel=0.05)


def test_just_below_the_objective_nothing_moves() -> None:
    """Fails if a server whose latencies are within the hysteresis tries depths that do not keep the objective."""
    drive = Drive(itl=1.0)
    level = drive.itl(2.0, steps=4)
    assert drive.itl(0.95, steps=500) == level
    assert drive.itl(0.85) < level


def test_headroom_is_left_for_what_is_not_measured() -> None:
    """Fails if the engine takes all of an objective, which a client measures with the API server on top."""
    objectives = Objectives({"itl": 1.0, "ttft": 1.0}, headroom=0.1)
    assert objectives.objective_s == {"itl": 1.0, "ttft": 1.0}, "what is shown is what was asked for"
    assert objectives.observe(Latencies(0.0, itls=Counter({0.89: 1}))) == 0.0
    assert objectives.observe(Latencies(0.1, itls=Counter({0.91: 1}))) == STEP
    whole, part = Objectives({"ttft": 1.0}), Objectives({"ttft": 1.0}, headroom=0.5)
    assert whole.observe(Latencies(0.0, wait_s=0.3)) == pytest.approx(0.5)
    assert part.observe(Latencies(0.0, wait_s=0.15)) == pytest.approx(0.5)


def test_steps_count_by_their_requests() -> None:
    """Fails if one request alone moves the level as far as a full batch: the percentile is one of tokens."""
    drive = Drive(itl=1.0)
    drive.itl(0.95, rows=8, steps=50)
    one = drive.itl(2.0, rows=1)
    assert one < STEP / 4
    assert drive.itl(2.0, rows=16) - one > STEP


def test_a_server_without_work_shows_no_load_and_forgets_slowly() -> None:
    """Fails if a lone client pays for the load of long ago, or each of its requests must find the depth again."""
    drive = Drive(itl=1.0)
    drive.itl(2.0, steps=20)
    assert drive.idle(seconds=1.0) == 0
    assert drive.itl(0.95) > 0.9
    assert drive.idle(seconds=120.0) == 0
    assert drive.itl(0.95) == 0


def test_the_queue_takes_depth_in_proportion_to_its_wait() -> None:
    """Fails if waiting requests are noticed only when they are late, or the level stays up after the queue is gone."""
    drive = Drive(ttft=1.0)
    assert drive.wait(0.1) == 0
    half = drive.wait(0.3)
    assert half == pytest.approx(0.5)
    assert drive.wait(0.29) == half  # hysteresis
    assert drive.wait(0.7) == 1
    assert drive.wait(0.0) == 0
    for _ in range(5):
        drive.first(0.0, 0.4)
    assert drive.wait(0.4) == 1  # prefill takes its part


def test_long_prefills_take_depth_too() -> None:
    """Fails if requests that are late though nobody waits are left to it, or one in a hundred is enough for that."""
    drive = Drive(ttft=1.0)
    for _ in range(30):
        level = drive.first(0.0, 1.5)
    assert level == 1
    for number in range(5000):
        level = drive.first(0.0, 1.5 if number % 200 == 0 else 0.3)
    assert level <= 2 * STEP


def test_an_objective_out_of_reach_is_said_once_for_each_time(said: list[str]) -> None:
    """Fails if the log is silent about an objective that is missed at the floor, or says it at each step."""
    drive = Drive(itl=0.05, ttft=0.5)
    drive.itl(0.08, steps=50)
    assert drive.objectives.level == 1
    assert not drive.objectives.unreachable
    drive.itl(0.08, steps=2000)
    assert drive.objectives.unreachable
    assert drive.objectives.observed_s["itl"] == 0.08
    (line,) = said
    assert "slo.itl_ms 50 is missed: p99 is 80 ms" in line
    assert "ttft" not in line
    drive.itl(0.01, steps=900)
    assert not drive.objectives.unreachable
    assert said[1:] == ["vllm_buddy: the objectives of slo are within reach again"]
    for _ in range(400):
        drive.wait(3.0)
    assert drive.objectives.unreachable
    assert "slo.ttft_ms 500 is missed: p99 is 3000 ms" in said[2]
    drive.idle()
    assert not drive.objectives.unreachable
    assert len(said) == 4


def test_time_without_work_is_none_at_the_floor(said: list[str]) -> None:
    """Fails if an objective is said to be out of reach after a burst of two seconds, and some without work."""
    drive = Drive(itl=0.05)
    drive.itl(0.08, steps=100)
    assert drive.objectives.level == 1
    drive.idle(seconds=6.0)
    drive.itl(0.08, steps=3)
    assert drive.objectives.level == 1
    assert not said
    assert not drive.objectives.unreachable
    drive.itl(0.08, steps=300)
    assert drive.objectives.unreachable


def test_a_percentile_forgets_and_is_nan_without_samples() -> None:
    """Fails if the metric shows latencies of minutes ago, or zero where nothing was measured."""
    window = Percentile()
    assert math.isnan(window.value())
    window.add(0.0, 9.0)
    window.add(1.0, 1.0, 98)
    window.add(2.0, 2.0, 1)
    assert window.value() == 2.0
    assert window.value(since=1.5) == 2.0
    window.forget(WINDOW_S + 0.5)
    assert window.value() == 2.0
    window.forget(WINDOW_S + 1.5)
    assert window.value() == 2.0
    window.forget(WINDOW_S + 2.5)
    assert math.isnan(window.value())
