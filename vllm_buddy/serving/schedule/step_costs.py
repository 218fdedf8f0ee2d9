"""What further rows of a decode step cost, and a draft pass, measured while serving.

The time of a decode step is taken as

    level * (cost of its number of rows + passes * sum of the expected costs of its draft passes)

Matrix products take other kernels for other numbers of rows, so that the cost is no line: on 2 CPU cores SmolLM2 takes
16% longer for two rows than for one, and no longer for three to six. Each number of rows has an estimate of its own,
from 9 on with those that lie within 12%. It starts where the expectation is, `EXPECTED_ROW` for each row.
"""

import math
from dataclasses import dataclass

EXPECTED_ROW = 0.05  # what SmolLM2 takes in batches on 2 CPU cores
_EXPECTED_WEIGHT, _MOST_WEIGHT = 2.0, 20.0  # observations that the expectation counts as, and all that is known
_LEVEL = 0.1  # share of the way that the level follows a step: contexts grow, the host is shared
_FIRST = 3  # steps of which the fastest gives the level: a first one may wait for a compiler, or for memory
_SLOWEST = 1.5  # a step counts as at most so many times what it is expected to take: the host may have been busy
_WIDTH = 0.12  # of numbers of rows that are taken together


@dataclass
class _Estimate:
    """A mean of what was seen of late. weight: observations that it stands for."""

    value: float
    weight: float = _EXPECTED_WEIGHT

    def observe(self, value: float) -> None:
        self.value = (self.weight * self.value + value) / (self.weight + 1.0)
        self.weight = min(self.weight + 1.0, _MOST_WEIGHT)


class StepCosts:
    """The costs of rows and draft passes.

    expected_row: what each row after the first is expected to cost, over the first. measured: whether costs follow the
    steps from there; else they stay.
    """

    def __init__(self, expected_row: float = EXPECTED_ROW, *, measured: bool = True) -> None:
        self.expected_row, self._measured = expected_row, measured
        self._level = math.inf  # seconds of a step of cost 1
        self._num_steps = 0
        self._steps: dict[int, tuple[int, _Estimate]] = {}  # a number of rows and its cost, by _group
        self._passes = _Estimate(1.0)

    @property
    def passes(self) -> float:
        """The time of draft passes, over the cost that is expected of them."""
        return self._passes.value

    def step(self, num_rows: int) -> float:
        """The cost of a step without draft passes. Only the ratio of two such costs means something."""
        known = self._steps.get(_group(num_rows))
        return self._expected(num_rows) if known is None else known[1].value

    def row(self, num_rows: int, most_rows: int) -> float:
        """The cost of one more row in a step of num_rows, over its own cost; the mean up to most_rows.

        The slope from num_rows on, by least squares over the costs of more rows that are known; without any, the
        expected one.
        """
        base = self.step(num_rows)
        known = [(n - num_rows, cost) for n, cost in self._steps.values() if num_rows < n <= most_rows]
        weights = sum(n * n * cost.weight for n, cost in known)
        if not weights:
            return self.expected_row / self._expected(num_rows)
        return max(0.0, sum(n * cost.weight * (cost.value - base) for n, cost in known) / (weights * base))

    def observe(self, num_rows: int, pass_costs: float, seconds: float) -> None:
        """Learn from a step that had decoding requests alone.

        num_rows: tokens of the step. pass_costs: the sum of the expected costs of the draft passes after it, over a
        step of cost 1.
        """
        if not self._measured:
            return
        usual = self.step(num_rows) + self.passes * pass_costs
        self._num_steps += 1
        if self._num_steps <= _FIRST:
            self._level = min(self._level, seconds / usual)
        seen = min(seconds / self._level, _SLOWEST * usual)
        if pass_costs > 0.0:
            self._passes.observe(max(0.0, seen - self.step(num_rows)) / pass_costs)
        else:
            known = self._steps.setdefault(_group(num_rows), (num_rows, _Estimate(self._expected(num_rows))))
            known[1].observe(seen)
        self._level *= 1.0 + _LEVEL * (seen / usual - 1.0)

    def _expected(self, num_rows: int) -> float:
        return 1.0 + self.expected_row * (num_rows - 1)


def _group(num_rows: int) -> int:
    """A number for num_rows, the same for those that are taken together."""
    alone = int(1.0 / _WIDTH)
    return num_rows if num_rows <= alone else alone + math.ceil(math.log(num_rows / alone) / math.log1p(_WIDTH))
