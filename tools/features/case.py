"""A case: one feature of vLLM, used over HTTP as a client would, with checks of what came back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tools.features.client import Client

GROUPS = ("Sampling", "Prompts", "Answers", "Requests that end otherwise", "Administration")


@dataclass(frozen=True)
class Refused:
    """What a case returns where the feature was refused, with an error that says why. reason: for the table."""

    reason: str


@dataclass(frozen=True)
class Differs:
    """What a case returns where a routed server does something else than stock vLLM. how: for the table."""

    how: str


@dataclass(frozen=True)
class Case:
    """One feature.

    run: raises AssertionError where the feature does not work. Returns what stock vLLM must return too at budget 1.0
        (None: there is nothing to compare), or Refused or Differs.
    slow: whether it is left out of the default tests.
    """

    name: str
    group: str
    run: Callable[[Client], Any]
    slow: bool


_CASES: list[Case] = []


def case(group: str, name: str, *, slow: bool = False) -> Callable[[Callable[[Client], Any]], Callable[[Client], Any]]:
    """Register a function as the case `name` of `group`."""

    def register(run: Callable[[Client], Any]) -> Callable[[Client], Any]:
        assert group in GROUPS
        _CASES.append(Case(name, group, run, slow))
        return run

    return register


def all_cases() -> list[Case]:
    """All cases, in the order of their groups."""
    from tools.features import administration, answers, endings, prompts, sampling

    assert all((administration, answers, endings, prompts, sampling))  # importing them registers their cases
    return sorted(_CASES, key=lambda c: GROUPS.index(c.group))
