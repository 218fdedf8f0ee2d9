"""The interface of an evaluation engine, which scores samples under policies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vllm_buddy.evaluation.policy import Policy
from vllm_buddy.evaluation.sample import Sample

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Variant:
    """A policy at one budget. depth: number of layers that each token runs."""

    policy: Policy
    budget: float
    depth: int


@dataclass(frozen=True)
class Scores:
    """Scores of samples: one array per sample, with one element for each of its targets.

    logprobs: natural logarithm of the target's probability. greedy: the most likely token.
    kl: KL(unrouted base model || variant) in nats; None if it is not measured.
    """

    logprobs: list[np.ndarray]
    greedy: list[np.ndarray]
    kl: list[np.ndarray] | None = None


@dataclass(frozen=True)
class Task:
    """Samples that are scored under every variant.

    name: shown as progress. compare: whether to compare with the unrouted model; an engine that can do so measures KL.
    """

    name: str
    samples: Sequence[Sample]
    compare: bool


class Engine(Protocol):
    """Scores samples with a model under several policies."""

    def score(self, tasks: Sequence[Task], variants: Sequence[Variant], report: Report) -> list[list[Scores]]:
        """Return the scores of the samples of each task under each variant, in the order of the samples."""
