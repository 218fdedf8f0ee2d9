"""Collects measurements of several variants round by round, and refuses those that must not be shown."""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.harness.result_rows import percentiles


class Refused(SystemExit):
    """Ends a benchmark and says why its figures must not be printed."""


def at_least(least: int) -> Callable[[str], int]:
    """Return an option's type: a whole number of at least `least`. Others are refused before anything starts."""

    def whole_number(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is too few; at least {least} is needed")
        return number

    return whole_number


positive_int = at_least(1)


def add_rounds_option(parser: argparse.ArgumentParser, default: int, short: int | None = None) -> None:
    """Add --rounds.

    short: the default of the short form, if the benchmark has one. --rounds is then None unless it is given.
    """
    if short is None:
        parser.add_argument("--rounds", type=positive_int, default=default, help=f"default: {default}")
    else:
        parser.add_argument("--rounds", type=positive_int, help=f"default: {default}, or {short} if short")


def in_turn(variants: Sequence[Any], round_index: int) -> list[Any]:
    """Return all variants in an order that begins with a different one in each round."""
    first = round_index % len(variants)
    return [*variants[first:], *variants[:first]]


class Rounds:
    """Figures of variants that ran one after the other in each of `num_rounds` rounds.

    It refuses to return figures of a variant whose outputs were not checked, or which finished fewer rounds than asked.
    Ratios are taken within a round, where all variants saw the same state of the machine.
    """

    def __init__(self, num_rounds: int) -> None:
        if num_rounds < 1:
            raise Refused(f"{num_rounds} rounds measure nothing; at least 1 is needed")
        self.num_rounds = num_rounds
        self._checked: set[str] = set()
        self._values: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)

    def mark_checked(self, variants: Iterable[str]) -> None:
        """Record that the outputs of these variants were compared with a reference and are right."""
        self._checked.update(variants)

    def add(self, round_index: int, variant: str, **figures: float) -> None:
        """Add the figures of one run, by metric."""
        for metric, value in figures.items():
            self._values[variant, metric][round_index] = float(value)

    def values(self, metric: str, variant: str) -> np.ndarray:
        """Return [num_rounds] values, in the order of the rounds.

        Raises:
            Refused: the variant is unchecked or incomplete, or a value is not a finite number.
        """
        if variant not in self._checked:
            raise Refused(f"what '{variant}' computes was not checked, so nothing is said about its {metric}")
        found = self._values[variant, metric]
        if sorted(found) != list(range(self.num_rounds)):
            raise Refused(
                f"'{variant}' finished {len(found)} of {self.num_rounds} rounds, so nothing is said about its {metric}"
            )
        values = np.array([found[index] for index in range(self.num_rounds)])
        if not np.isfinite(values).all():
            raise Refused(f"the {metric} of '{variant}' is not a number in every round: {values.tolist()}")
        return values

    def ratio(self, metric: str, variant: str, peer: str) -> np.ndarray:
        """Return [num_rounds] ratios: `metric` of `variant` over that of `peer`."""
        below = self.values(metric, peer)
        if not below.all():
            raise Refused(f"the {metric} of '{peer}' is 0 in a round, so there is no ratio to it")
        return self.values(metric, variant) / below

    def row(self, metric: str, values: np.ndarray, **about: Any) -> dict[str, Any]:
        """Return a row of a results file."""
        return {"metric": metric, **about, **percentiles(values.tolist()), "n": len(values)}
