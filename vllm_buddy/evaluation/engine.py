"""What an engine has to do: score samples under policies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vllm_buddy.evaluation.policy import Policy
from vllm_buddy.evaluation.sample import Sample

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Variant:
    """A policy at one budget. depth: layers per token."""

    policy: Policy
    budget: float
    depth: int


@dataclass(frozen=True)
class Scores:
    """One array per sample, with an element for each of its targets.

    logprobs: natural log of the target's probability. greedy: the most likely token.
    kl: KL(unrouted base model || variant), nats; None where it was not measured.
    """

    logprobs: list[np.ndarray]
    greedy: list[np.ndarray]
    kl: list[np.ndarray] | None = None


@dataclass(frozen=True)
class Task:
    """Samples that are scored under every variant.

    name: for progress. compare: with the unrouted model; an engine that can then measures KL.
    """

    name: str
    samples: Sequence[Sample]
    compare: bool


class Engine(Protocol):
    """Runs a model under policies."""

    def score(self, tasks: Sequence[Task], variants: Sequence[Variant], report: Report) -> list[list[Scores]]:
        """For each task and each variant the scores of the task's samples, in their order."""
