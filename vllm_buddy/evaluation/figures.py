"""Computes figures with standard errors from scores. Each figure is a row of the results file."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vllm_buddy.artifact import RepairKind
from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation.choices import ChoiceRow, is_right
from vllm_buddy.evaluation.engine import Scores, Variant
from vllm_buddy.evaluation.sample import Sample


@dataclass(frozen=True)
class Figure:
    """One measured value.

    repair: kind of repair of the policy's artifact. layers: number of layers executed per token. The two together
    determine the speed. n: number of tokens, questions or sequences that the value is computed from.
    """

    policy: str
    repair: RepairKind
    budget: float
    layers: int
    metric: str
    value: float
    stderr: float
    n: int

    def row(self) -> dict[str, Any]:
        """Return the figure as it is written to the results file."""
        return asdict(self)


def text_figures(variant: Variant, scores: Scores, dense: Scores) -> list[Figure]:
    """Return perplexity, agreement with the unrouted model, and KL if it is measured. Standard errors are over windows.

    The standard error of perplexity follows from the delta method: perplexity * stderr(mean loss).

    scores: of windows with equally many targets. dense: scores of the unrouted model.

    Raises:
        EvaluationError: the loss is not a finite number.
    """
    loss, loss_error = _mean_over_windows([-array for array in scores.logprobs])
    if not math.isfinite(loss):
        raise EvaluationError(
            f"the loss of policy '{variant.policy.name}' at budget {variant.budget:g} is {loss}; the model or the "
            "artifact may be damaged"
        )
    perplexity = math.exp(loss)
    figures = {"perplexity": (perplexity, perplexity * loss_error)}
    if scores.kl is not None:
        figures["kl"] = _mean_over_windows(scores.kl)
    figures["agreement"] = _mean_over_windows([a == b for a, b in zip(scores.greedy, dense.greedy, strict=True)])
    n = sum(map(len, scores.logprobs))
    return [_figure(variant, metric, *value, n) for metric, value in figures.items()]


def choice_figures(variant: Variant, scores: Scores, rows: Sequence[ChoiceRow]) -> list[Figure]:
    """Return accuracy by log-probability and by log-probability per character, with binomial standard errors.

    scores: of the samples of ChoiceRow.samples, row by row.
    """
    totals = np.array([float(array.sum()) for array in scores.logprobs]).reshape(len(rows), -1).tolist()
    figures = []
    for metric, per_character in (("piqa_acc", False), ("piqa_acc_norm", True)):
        right = [is_right(row, total, per_character=per_character) for row, total in zip(rows, totals, strict=True)]
        share = sum(right) / len(rows)
        # The standard error of a sample, with n - 1, as in the harness.
        figures.append(_figure(variant, metric, share, math.sqrt(share * (1 - share) / (len(rows) - 1)), len(rows)))
    return figures


def path_figures(variant: Variant, samples: Sequence[Sample]) -> list[Figure]:
    """Return the number of distinct paths and the share of tokens on the most common one: the extent of routing."""
    counts = variant.policy.path_counts(samples, variant.depth)
    top_share = counts.most_common(1)[0][1] / counts.total()
    return [
        _figure(variant, "distinct_paths", float(len(counts)), 0.0, len(samples)),
        _figure(variant, "top_path_share", top_share, 0.0, counts.total()),
    ]


def _figure(variant: Variant, metric: str, value: float, stderr: float, n: int) -> Figure:
    policy = variant.policy
    return Figure(policy.name, policy.artifact.repair, variant.budget, variant.depth, metric, value, stderr, n)


def _mean_over_windows(per_token: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the mean and its standard error, with windows as the sampling units. per_token: arrays of equal length."""
    means = np.array([array.mean(dtype=np.float64) for array in per_token])
    return float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means)))
