"""Measures when the requests of an engine get their tokens. Numbers only, nothing of vLLM.

Times are those of the scheduler: from a request's arrival there to the step that made its token. The way through the
API server, to and fro, is not in them.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

_STARTS = 16  # last times between two requests that left the queue


class FirstToken(NamedTuple):
    """How a request came to its first token: seconds in the queue, and from then on."""

    waited_s: float
    prefill_s: float


@dataclass
class Latencies:
    """What was measured up to `now`, in seconds of a clock that never goes back.

    itls: times between tokens, each with the number of requests whose newest token came so long after the one before.
    first_tokens: those that came. wait_s: how long the oldest request in the queue has waited, or how long a new one
    would wait behind a queue at the pace at which requests left it, whichever is more; 0: none waits.
    """

    now: float
    wait_s: float = 0.0
    itls: Counter[float] = field(default_factory=Counter)
    first_tokens: list[FirstToken] = field(default_factory=list)


@dataclass
class _Times:
    arrived: float
    started: float | None = None
    last_token: float | None = None


class LatencyMeter:
    """Follows requests from their arrival to their end; one that it was not told of is passed over.

    clock: returns seconds, and never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._times: dict[str, _Times] = {}
        self._waiting: dict[str, float] = {}  # in the order of arrival
        self._leaves_some = False  # whether requests wait for more than the next step
        self._last_start = -math.inf
        self._intervals: deque[float] = deque(maxlen=_STARTS)
        self._measured = Latencies(0.0)

    def arrives(self, request_id: str) -> None:
        """Begin to follow a request."""
        self._waiting[request_id] = now = self._clock()
        self._times[request_id] = _Times(now)

    def starts(self, request_ids: Iterable[str]) -> None:
        """Note the requests, if any, that a step takes from the queue. One that is preempted does not start again."""
        now = self._clock()
        for request_id in request_ids:
            arrived = self._waiting.pop(request_id, None)
            if arrived is None:
                continue
            self._times[request_id].started = now
            if arrived <= self._last_start:  # else the server waited for it
                self._intervals.append(now - self._last_start)
            self._last_start = now
        self._leaves_some = bool(self._waiting)

    def gets_token(self, request_ids: Iterable[str]) -> None:
        """Note the requests to which a step gave tokens; several at once, as of drafts, are one."""
        now = self._clock()
        for request_id in request_ids:
            times = self._times.get(request_id)
            if times is None or times.started is None:
                continue
            if times.last_token is None:
                self._measured.first_tokens.append(FirstToken(times.started - times.arrived, now - times.started))
            else:
                self._measured.itls[now - times.last_token] += 1
            times.last_token = now

    def ends(self, request_id: str) -> None:
        """Forget a request."""
        self._times.pop(request_id, None)
        self._waiting.pop(request_id, None)

    def goes_on(self) -> None:
        """Begin all times anew, after the server stood still on purpose."""
        now = self._clock()
        self._waiting = dict.fromkeys(self._waiting, now)
        for times in self._times.values():
            if times.last_token is not None:
                times.last_token = now
            elif times.started is not None:
                times.arrived += now - times.started
                times.started = now
            else:
                times.arrived = now

    def take(self) -> Latencies:
        """What was measured since the last call."""
        measured, self._measured = self._measured, Latencies(0.0)
        measured.now = self._clock()
        if self._waiting:
            measured.wait_s = measured.now - next(iter(self._waiting.values()))
            if self._leaves_some and self._intervals:
                pace = sum(self._intervals) / len(self._intervals)
                measured.wait_s = max(measured.wait_s, len(self._waiting) * pace)
        return measured
