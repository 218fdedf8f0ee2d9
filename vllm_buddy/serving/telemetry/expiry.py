"""Notices that nothing has come for a while: statistics leave an engine with its steps, and an idle one has none."""

import threading
import time
from collections.abc import Callable
from typing import Any

# Calls a function after some seconds, unless the process ends before.
Timer = Callable[[float, Callable[[], None]], Any]


def thread_timer(seconds: float, function: Callable[[], None]) -> None:
    """A Timer. A thread of its own, because `LLM` has no event loop."""
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()


class Expiry:
    """Calls `expired` once nothing has been seen for `after_s` seconds, and again after each time that something was.

    At most one timer waits, however often something is seen.
    """

    def __init__(
        self,
        after_s: float,
        expired: Callable[[], None],
        timer: Timer = thread_timer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._after_s = after_s
        self._expired = expired
        self._timer = timer
        self._clock = clock
        self._lock = threading.Lock()
        self._last = 0.0
        self._waits = False

    def seen(self) -> None:
        """Note that something has come. To be called before it is used: what `expired` undoes is then older."""
        with self._lock:
            self._last = self._clock()
            starts, self._waits = not self._waits, True
        if starts:
            self._timer(self._after_s, self._look)

    def _look(self) -> None:
        with self._lock:
            left_s = self._last + self._after_s - self._clock()
            self._waits = left_s > 0
            if not self._waits:
                self._expired()
        if left_s > 0:
            self._timer(left_s, self._look)
