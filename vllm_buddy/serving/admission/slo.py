"""Service objectives: how far budget "auto" must go down so that latencies stay within what the operator promises.

Numbers only, nothing of vLLM and no clock. The result is a level from 0, all as without load, to 1, the fewest layers.
It is the greatest of three, each for one way in which depth costs time:

*Time between tokens*, and *prefill*, follow the depth of a step at once. Which depth gives which 99th percentile is not
known and changes with the load, so it is found by trial. A sample above the objective raises the level by STEP, one
below lowers it by STEP * q / (1 - q), q = 0.01. The level thus rests only where a share q of samples is above, which is
to say where the percentile is the objective, whatever the distribution (Robbins and Monro 1951; as a controller: Gibbs
and Candes, arXiv 2106.00170). Hysteresis: samples just below the objective do not lower the level, so that it does not
try depths that will not do. Nothing is wound up below 0, and above 1 only BEYOND, so that a few late samples at the
fewest layers are made up for before more layers are tried.

*Waiting* does not follow the depth but its sum over time: a queue grows while fewer requests are served than arrive.
Here the level is proportional to the wait, on a line from WAIT[0] to WAIT[1] of what the objective leaves beside a
usual prefill, so that the queue stops growing at the depth at which the server keeps up. The line ends below 1 because
requests do not arrive evenly.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping

from vllm_buddy.serving.admission.latency import FirstToken, Latencies
from vllm_buddy.serving.admission.load import lowered, on_line
from vllm_buddy.serving.start.setting_sections import ITL, TTFT

QUANTILE = 0.99
WINDOW_S = 30.0  # of the percentiles that are shown
STEP = 0.05
BEYOND = 5 * STEP
WAIT = (0.1, 0.5)
_STEPS = 256  # over which the usual number of tokens of a step is taken
_PREFILLS = 16  # recent ones, of which the median is usual
_IDLE_RECOVERY_S = 60.0  # without work, the level goes from 1 to 0 in this time
_FLOOR = 1 - 2 * STEP  # a level that stays above it is held there by the objectives
_GRACE_S = 5.0  # at the floor, before an objective is said to be out of reach
_REFRESH_S = 0.5  # of the percentiles

logger = logging.getLogger(f"vllm.{__name__}")


class _TrialLevel:
    """A level that rests where a share 1 - QUANTILE of samples is above the objective."""

    def __init__(self, objective_s: float, hysteresis: float) -> None:
        self.level = 0.0
        self._objective_s = objective_s
        self._calm_s = (1 - hysteresis) * objective_s

    def add(self, seconds: float, weight: float = 1.0) -> None:
        """Take in a sample. weight: 1 on average."""
        if seconds > self._objective_s:
            self.level = min(1 + BEYOND, self.level + STEP * weight)
        elif seconds <= self._calm_s:
            self.level = max(0.0, self.level - STEP * weight * (1 - QUANTILE) / QUANTILE)


class Percentile:
    """The 99th percentile of samples of the last WINDOW_S seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float, int]] = deque()

    def add(self, now: float, seconds: float, count: int = 1) -> None:
        """Take in `count` equal samples. now: never before that of an earlier call."""
        self._samples.append((now, seconds, count))

    def forget(self, now: float) -> None:
        """Drop what is older than the window."""
        while self._samples and self._samples[0][0] < now - WINDOW_S:
            self._samples.popleft()

    def value(self, since: float = -math.inf) -> float:
        """The smallest sample that QUANTILE of those since then do not exceed; NaN without samples."""
        samples = sorted((seconds, count) for at, seconds, count in self._samples if at >= since)
        left = QUANTILE * sum(count for _, count in samples)
        for seconds, count in samples:
            left -= count
            if left <= 1e-9:
                return seconds
        return math.nan


class Objectives:
    """The level that keeps the objectives, or comes as close as it can.

    objective_s: seconds between tokens (ITL) and to the first token (TTFT), either or both.
    hysteresis: share of an objective by which a latency must be below it before the level falls, in [0, 1).
    headroom: share of an objective that is left for what is not measured here; the rest is kept. In [0, 1).
    """

    def __init__(self, objective_s: Mapping[str, float], hysteresis: float = 0.1, headroom: float = 0.0) -> None:
        self.objective_s = dict(objective_s)
        self.observed_s = dict.fromkeys(self.objective_s, math.nan)
        self._kept_s = {name: (1 - headroom) * seconds for name, seconds in self.objective_s.items()}
        self._trials = {name: _TrialLevel(seconds, hysteresis) for name, seconds in self._kept_s.items()}
        self._percentiles = {name: Percentile() for name in self.objective_s}
        self._prefills: deque[float] = deque(maxlen=_PREFILLS)
        self._falling_wait = lowered(WAIT, hysteresis)
        self._usual_count = 0.0
        self._queue_level = 0.0
        self._idle = True
        self._last = -math.inf
        self._next_refresh = -math.inf
        self._at_floor_since: float | None = None
        self._out_of_reach: list[str] = []

    @property
    def level(self) -> float:
        """From 0, as without load, to 1, the fewest layers. A server without work is at 0."""
        return 0.0 if self._idle else self._level

    @property
    def unreachable(self) -> bool:
        """Whether an objective is missed though the server has been at the fewest layers for some seconds."""
        return bool(self._out_of_reach) and not self._idle

    def observe(self, measured: Latencies, *, idle: bool = False) -> float:
        """Take in what was measured since the last call; returns the level. idle: whether there is no request left."""
        now = measured.now
        if self._idle and self._last > -math.inf:
            for trial in self._trials.values():
                trial.level = max(0.0, trial.level - (now - self._last) / _IDLE_RECOVERY_S)
        self._last, self._idle = now, idle
        if ITL in self.objective_s:
            for seconds, count in measured.itls.items():
                self._add_itl(now, seconds, count)
        if TTFT in self.objective_s:
            for first in measured.first_tokens:
                self._add_first(now, first)
            self._see_queue(measured.wait_s)
        if now >= self._next_refresh or idle:
            self._next_refresh = now + _REFRESH_S
            self._refresh(now, measured.wait_s)
        if idle:
            self._at_floor_since = None
        return self.level

    @property
    def _level(self) -> float:
        return min(1.0, max(self._queue_level, *(trial.level for trial in self._trials.values())))

    def _add_itl(self, now: float, seconds: float, count: int) -> None:
        self._percentiles[ITL].add(now, seconds, count)
        self._usual_count += (count - self._usual_count) / _STEPS if self._usual_count else count
        self._trials[ITL].add(seconds, count / self._usual_count)

    def _add_first(self, now: float, first: FirstToken) -> None:
        self._prefills.append(first.prefill_s)
        self._percentiles[TTFT].add(now, first.waited_s + first.prefill_s)
        self._trials[TTFT].add(first.prefill_s)

    def _see_queue(self, wait_s: float) -> None:
        objective = self._kept_s[TTFT]
        wait = wait_s / max(objective - self._usual_prefill, objective / 10)
        self._queue_level = max(on_line(wait, WAIT), min(self._queue_level, on_line(wait, self._falling_wait)))

    @property
    def _usual_prefill(self) -> float:
        return statistics.median(self._prefills) if self._prefills else 0.0

    def _refresh(self, now: float, wait_s: float) -> None:
        """Percentiles, and whether an objective is out of reach."""
        for name, percentile in self._percentiles.items():
            percentile.forget(now)
            self.observed_s[name] = percentile.value()
        if self._level < _FLOOR:
            if self._out_of_reach:
                logger.info("vllm_buddy: the objectives of slo are within reach again")
            self._at_floor_since, self._out_of_reach = None, []
        elif self._at_floor_since is None:
            self._at_floor_since = now
        elif not self._out_of_reach and now - self._at_floor_since >= _GRACE_S:
            self._say_what_is_missed(self._at_floor_since, wait_s)

    def _say_what_is_missed(self, since: float, wait_s: float) -> None:
        found = {name: percentile.value(since) for name, percentile in self._percentiles.items()}
        if TTFT in found and not found[TTFT] > wait_s:  # also where no first token has come
            found[TTFT] = wait_s + self._usual_prefill
        self._out_of_reach = [name for name, seconds in found.items() if seconds > self.objective_s[name]]
        if self._out_of_reach:
            logger.warning(
                "vllm_buddy: at the smallest budget that slo may lead to, %s; raise the objective, lower slo.floor, or "
                "send fewer requests. This is said once until the server goes deeper again.",
                " and ".join(
                    f"slo.{name}_ms {_ms(self.objective_s[name])} is missed: p99 is {_ms(found[name])} ms"
                    for name in self._out_of_reach
                ),
            )


def _ms(seconds: float) -> str:
    return f"{round(seconds * 1e3, 1):g}"
