"""Pairs the quality of a policy with the decode speed of the variant that does the same work.

The decode speed of a policy depends on its depth and on what runs where a layer is skipped, but not on which layers are
skipped, as long as a batch runs one path. With several paths, as a router may choose them, it is slower than drawn. So
a policy of `vllm-buddy eval` has the speed of this variant of benchmarks.speed.decode:

| policy | variant |
|---|---|
| dense | `stock` |
| static layer set without repair | `pruned BUDGET`, as stock vLLM serves it |
| bypass | `buddy BUDGET` |
| LoRA, or no repair | `buddy BUDGET, no bypass`: LoRA is in the weights |
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.rounds import Refused
from vllm_buddy.baselines import STATIC_METHODS
from vllm_buddy.evaluation import Figure
from vllm_buddy.evaluation.policy import DENSE

PERPLEXITY, ACCURACY = "perplexity", "piqa_acc"
STATIC = "static"


@dataclass(frozen=True)
class Point:
    """A policy at one budget.

    family: the repair of the policy, or STATIC or DENSE. speed: p20, p50 and p80 of decode tokens/s over stock.
    quality: perplexity over the unrouted model's, or accuracy.
    """

    policy: str
    family: str
    speed: tuple[float, float, float]
    quality: float
    stderr: float


def points(files: Iterable[Sequence[Figure]], rows: Sequence[dict[str, Any]], batch: int, metric: str) -> list[Point]:
    """Return the points of one metric, the unrouted model first.

    files: the figures of each results file; each file has its own unrouted model. rows: of benchmarks.speed.decode.

    Raises:
        Refused: a policy has no speed, a file has no unrouted model, or no file has the metric.
    """
    speeds = {row["variant"]: row for row in rows if row["metric"] == "ratio_to_stock" and row["batch"] == batch}
    found: list[tuple[Figure, Point]] = []
    for figures in files:
        own = [figure for figure in figures if figure.metric == metric]
        dense = next((figure for figure in own if figure.policy == DENSE), None)
        if own and dense is None:
            raise Refused(f"{metric} of {own[0].policy} has nothing to be compared with: its file has no '{DENSE}'")
        unit = dense.value if dense is not None and metric == PERPLEXITY else 1.0
        for figure in own:
            row = _speed_row(figure, speeds, batch)
            speed = (row["p20"], row["p50"], row["p80"])
            point = Point(figure.policy, _family(figure), speed, figure.value / unit, figure.stderr / unit)
            found.append((figure, point))
    unrouted = [pair for pair in found if pair[0].policy == DENSE]
    if not unrouted:
        raise Refused(f"no file has figures of {metric}")
    best_known = max(unrouted, key=lambda pair: pair[0].n)  # files differ in how much they score
    return [best_known[1], *(point for figure, point in found if figure.policy != DENSE)]


def front(found: Iterable[Point], *, lower_is_better: bool) -> list[Point]:
    """Return the points that no other point beats in both speed and quality, the fastest first."""
    kept: list[Point] = []
    for point in sorted(found, key=lambda p: (-p.speed[1], p.quality if lower_is_better else -p.quality)):
        if not kept or (point.quality < kept[-1].quality if lower_is_better else point.quality > kept[-1].quality):
            kept.append(point)
    return kept


def _speed_row(figure: Figure, speeds: dict[str, dict[str, Any]], batch: int) -> dict[str, Any]:
    variant = _variant(figure)
    row = speeds.get(variant)
    if row is None or row["layers"] != figure.layers:
        has = "none" if row is None else f"one of {row['layers']} layers"
        raise Refused(
            f"policy '{figure.policy}' at {figure.layers} layers needs the speed of '{variant}' at batch {batch}, and "
            f"there is {has}; run python -m benchmarks.speed.decode"
        )
    return row


def _variant(figure: Figure) -> str:
    """Return the variant of benchmarks.speed.decode that does the same work as the policy."""
    return {
        DENSE: "stock",
        STATIC: f"pruned {figure.budget}",
        "bypass": f"buddy {figure.budget}",
    }.get(_family(figure), f"buddy {figure.budget}, no bypass")


def _family(figure: Figure) -> str:
    # `vllm-buddy eval` uses the names of static methods only for their layer sets without repair.
    if figure.repair == "none" and figure.policy in STATIC_METHODS:
        return STATIC
    return DENSE if figure.policy == DENSE else figure.repair
