"""Measures the union effect: what it costs when the requests of a batch run different paths.

A layer runs once for all rows whose path contains it, so a batch calls every layer of the union of its paths. Two
bounds limit the cost, both measured in the same rounds. At best a batch is as fast as when all rows run one path of its
depth. At worst, apart from gathering and scattering rows, it is as fast as when all rows run one path with as many
layers as the union (between the measured depths, ms per step are interpolated). The paths of the bounds are the
artifact's: a random path without repair may be so badly conditioned that rounding alone changes its outputs, and the
check refuses it.

There are two series of batches, all of one depth: *random* paths, whose union grows with their number until it is the
whole model; and as many paths as the batch has requests, drawn from a *pool* of layers, so that the union can have any
size. If the artifact has a bypass, everything is measured with it, where a row that skips a layer costs a bypass, and
without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.harness import engines
from benchmarks.harness.given_paths import draw_paths, draw_prompts, on_paths, union_of
from benchmarks.harness.lineup import Lineup
from benchmarks.harness.rounds import Rounds, in_turn
from vllm_buddy.method import LayerPath, depth_for_budget

NUM_DEPTHS = 6  # at which the bounds are measured


@dataclass(frozen=True)
class Point:
    """A batch to measure.

    series: "random", "pool", or "one path" for the bounds. paths: request i runs path i modulo their number.
    bypass: whether rows that skip a layer go through its bypass.
    """

    series: str
    paths: tuple[LayerPath, ...]
    bypass: bool

    @property
    def depth(self) -> int:
        return self.paths[0].bit_count()

    @property
    def union_layers(self) -> int:
        return union_of(self.paths).bit_count()

    @property
    def name(self) -> str:
        repair = "" if self.bypass else ", no bypass"
        number = len(self.paths)
        kind = {"random": f"{number} random paths", "pool": f"{number} paths from a pool"}.get(self.series, self.series)
        return f"{kind}, {self.depth} layers, union {self.union_layers}{repair}"

    def about(self, batch: int) -> dict[str, Any]:
        """Return the columns that describe it in its rows."""
        return {
            "variant": self.name,
            "series": self.series,
            "bypass": self.bypass,
            "batch": batch,
            "layers": self.depth,
            "distinct_paths": len(self.paths),
            "union_layers": self.union_layers,
        }


def all_points(lineup: Lineup, depth: int, batch: int, path_counts: Sequence[int], seed: int) -> list[Point]:
    """Return one path of each depth from `depth` to the whole model, and the two series of batches."""
    rng = np.random.default_rng(seed)
    depths = bound_depths(depth, lineup.num_layers)
    counts = [count for count in path_counts if 1 < count <= batch]
    drawn = draw_paths(rng, max(counts, default=1), depth, lineup.num_layers)
    batches = [("one path", [lineup.path(d)]) for d in depths]
    batches += [("random", drawn[:count]) for count in counts]
    batches += [("pool", draw_paths(rng, batch, depth, lineup.num_layers, union=pool)) for pool in depths[1:-1]]
    bypasses = (False,) if lineup.artifact.bypass is None else (True, False)
    return [Point(series, tuple(paths), bypass) for series, paths in batches for bypass in bypasses]


def measure(
    lineup: Lineup,
    batch: int,
    budget: float,
    path_counts: Sequence[int],
    num_rounds: int,
    tokens: int,
    prompt_tokens: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Check all batches, time their decode steps, and return one row per figure. seed: of the random paths."""
    points = all_points(lineup, depth_for_budget(budget, lineup.num_layers), batch, path_counts, seed)
    variants = [on_paths(lineup, point.paths, point.name, bypass=point.bypass) for point in points]
    rounds = Rounds(num_rounds)
    rng = np.random.default_rng(batch)
    lineup.check(variants, draw_prompts(lineup, rng, batch, prompt_tokens), rounds)
    for index in range(-1, num_rounds):  # the first warms up
        prompts = draw_prompts(lineup, rng, batch, prompt_tokens)
        for variant in in_turn(variants, index):
            run = engines.decode(variant, prompts, tokens)
            if index >= 0:
                rounds.add(index, variant.name, ms_per_step=float(np.median(run.step_ms)))
    return [{**row, **lineup.about()} for row in rows_of(points, rounds, batch)]


def bound_depths(depth: int, num_layers: int) -> list[int]:
    """Return evenly spaced depths from `depth` to the whole model."""
    return sorted({round(d) for d in np.linspace(depth, num_layers, NUM_DEPTHS).tolist()})


def interpolated(union_layers: int, ms_by_depth: dict[int, np.ndarray]) -> np.ndarray:
    """Return [num_rounds] the ms per step of one path of `union_layers` layers. ms_by_depth: measured, by round.

    Raises:
        ValueError: the union has fewer or more layers than were measured.
    """
    depths = sorted(ms_by_depth)
    if not depths[0] <= union_layers <= depths[-1]:
        raise ValueError(f"a union of {union_layers} layers lies outside of the depths measured, {depths}")
    by_round = np.stack([ms_by_depth[depth] for depth in depths], axis=1)
    return np.array([np.interp(union_layers, depths, ms) for ms in by_round])


def rows_of(points: Sequence[Point], rounds: Rounds, batch: int) -> list[dict[str, Any]]:
    """Return the rows of all points: decode tokens/s and, for the series, both bounds, taken within each round."""
    rows = []
    for point in points:
        about = point.about(batch)
        ms = rounds.values("ms_per_step", point.name)
        rows.append(rounds.row("tokens_per_s", _tokens_per_s(batch, ms), **about))
        if point.series == "one path":
            continue
        one_path = {
            p.depth: rounds.values("ms_per_step", p.name)
            for p in points
            if p.series == "one path" and p.bypass == point.bypass
        }
        for bound, bound_ms in (
            ("one path", one_path[point.depth]),
            ("union", interpolated(point.union_layers, one_path)),
        ):
            rows.append(rounds.row("bound_tokens_per_s", _tokens_per_s(batch, bound_ms), bound=bound, **about))
            rows.append(rounds.row(f"ratio_to_{bound.replace(' ', '_')}", bound_ms / ms, **about))
    return rows


def _tokens_per_s(batch: int, ms_per_step: np.ndarray) -> np.ndarray:
    return batch * 1e3 / ms_per_step
