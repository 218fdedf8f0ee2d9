"""The price of compute for budget "auto" as a function of the server's load. Numbers only, nothing of vLLM.

Each signal x (waiting requests, running requests, share of the KV cache in use) is mapped to a line that is 0 up to
`low` and 1 from `high` on. The largest of them is the load. So that a fluctuating load does not move the price, each
signal has a second line for the way down, with both ends lowered by hysteresis * (high - low), though not below 0. The
level follows the first line up and the second down, and stays where it is between the two:

    level = max(up, min(level, down)) ,  up <= down .

At x = 0 both lines are 0, so a server without work is at level 0, whatever its level was before.
"""

from collections.abc import Iterable

Range = tuple[float, float]


class LoadPrice:
    """The level of load, and the price that follows from it.

    load_price: at level 1, nats per token for all layers. waiting, running, kv_use: (low, high) of the signals,
        0 <= low < high; running None: this signal is ignored. hysteresis: in [0, 1).
    """

    def __init__(
        self,
        load_price: float,
        waiting: Range = (1, 8),
        running: Range | None = None,
        kv_use: Range = (0.8, 0.95),
        hysteresis: float = 0.25,
    ) -> None:
        self._load_price = load_price
        self._up = (waiting, running, kv_use)
        self._down = tuple(None if ends is None else lowered(ends, hysteresis) for ends in self._up)
        self.level = 0.0

    def observe(self, num_waiting: int, num_running: int, kv_use: float) -> float:
        """Take in the server's state; returns the level, in [0, 1]."""
        signals = (num_waiting, num_running, kv_use)
        self.level = max(_load(signals, self._up), min(self.level, _load(signals, self._down)))
        return self.level

    def price(self, base: float) -> float:
        """The price `base` at the present level of load, never less than `base`."""
        return max(base, (1 - self.level) * base + self.level * self._load_price)


def lowered(ends: Range, hysteresis: float) -> Range:
    """The line for the way down."""
    low, high = ends
    gap = hysteresis * (high - low)
    return max(0.0, low - gap), high - gap


def on_line(x: float, ends: Range) -> float:
    """0 up to the first end, 1 from the second on, linear in between."""
    low, high = ends
    return min(1.0, max(0.0, (x - low) / (high - low)))


def _load(signals: Iterable[float], lines: Iterable[Range | None]) -> float:
    return max(on_line(x, ends) for x, ends in zip(signals, lines) if ends is not None)
