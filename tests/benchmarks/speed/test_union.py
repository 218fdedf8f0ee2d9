"""Tests the benchmark of the union effect: batches, bounds, rows and picture."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.harness.rounds import Rounds
from benchmarks.speed.union import all_points, bound_depths, interpolated, rows_of
from benchmarks.speed.union_plot import plot_union
from vllm_buddy.method import path_of

NUM_LAYERS, DEPTH, BATCH = 30, 15, 32
COUNTS = (2, 8, 32)


class FakeLineup:
    """Stands in for a model of 30 layers whose artifact keeps the first layers and the last."""

    num_layers = NUM_LAYERS

    def __init__(self, has_bypass: bool) -> None:
        self.artifact = SimpleNamespace(bypass=has_bypass or None)

    def path(self, depth: int) -> int:
        return path_of([*range(depth - 1), NUM_LAYERS - 1])


def _points(has_bypass: bool = True, batch: int = BATCH, counts: tuple[int, ...] = COUNTS, seed: int = 0) -> list:
    return all_points(FakeLineup(has_bypass), DEPTH, batch, counts, seed)


def _rows(has_bypass: bool = True) -> list[dict]:
    """Return steps of 1 ms per layer of the union, 2 with bypass, and 1.5 times as much for more than one path."""
    points, rounds = _points(has_bypass), Rounds(3)
    for point in points:
        for index in range(3):
            ms = point.union_layers * (1 + point.bypass) * (1 if len(point.paths) == 1 else 1.5) * (1 + index)
            rounds.add(index, point.name, ms_per_step=ms)
    rounds.mark_checked(point.name for point in points)
    return rows_of(points, rounds, BATCH)


def test_bounds_are_measured_from_the_depth_to_the_whole_model() -> None:
    """Fails if a union lies outside of the measured depths, so that there is no bound for it."""
    assert bound_depths(15, 30) == [15, 18, 21, 24, 27, 30]
    assert bound_depths(6, 8) == [6, 7, 8]
    assert bound_depths(30, 30) == [30]


def test_batches_span_unions_from_one_path_to_the_whole_model() -> None:
    """Fails if the picture's x axis has only two places, because the union of random paths grows so fast."""
    points = _points()
    series = {name: [p for p in points if p.series == name and p.bypass] for name in ("one path", "random", "pool")}
    assert [p.depth for p in series["one path"]] == [15, 18, 21, 24, 27, 30]
    assert [len(p.paths) for p in series["random"]] == list(COUNTS)
    assert [(len(p.paths), p.union_layers) for p in series["pool"]] == [(32, 18), (32, 21), (32, 24), (32, 27)]
    assert {p.depth for name in ("random", "pool") for p in series[name]} == {DEPTH}
    assert len({p.name for p in _points()}) == len(_points())  # rounds keep figures by name
    assert _points() == _points() != _points(seed=1)
    assert {p.bypass for p in points} == {True, False}
    assert {p.bypass for p in _points(has_bypass=False)} == {False}


def test_no_more_paths_than_requests() -> None:
    """Fails if a batch of 4 is said to hold 32 paths."""
    points = _points(has_bypass=False, batch=4, counts=(1, 2, 4, 32))
    assert [len(p.paths) for p in points if p.series == "random"] == [2, 4]


def test_interpolation_is_within_each_round() -> None:
    """Fails if a bound is from another round, in which the machine was slower, or beyond the measured depths."""
    ms = {30: np.array([300.0, 3.0]), 15: np.array([150.0, 3.0]), 20: np.array([160.0, 3.0])}
    np.testing.assert_allclose(interpolated(15, ms), [150, 3])
    np.testing.assert_allclose(interpolated(18, ms), [156, 3])
    np.testing.assert_allclose(interpolated(25, ms), [230, 3])
    for outside in (14, 31):
        with pytest.raises(ValueError, match="outside"):
            interpolated(outside, ms)


def test_rows_compare_with_bounds_of_the_same_kind() -> None:
    """Fails if a batch with bypass has bounds without, or a ratio is upside down: above 1 is faster."""
    rows = _rows()
    for row in rows:
        if row["metric"] == "ratio_to_union":
            assert row["p20"] == row["p80"] == pytest.approx(1 / 1.5, abs=1e-4)
        if row["metric"] == "ratio_to_one_path":
            assert row["p50"] == pytest.approx(DEPTH / row["union_layers"] / 1.5, abs=1e-4)
        if row["metric"] == "bound_tokens_per_s":
            layers = {"one path": DEPTH, "union": row["union_layers"]}[row["bound"]]
            assert row["p50"] == pytest.approx(BATCH * 1e3 / (layers * (1 + row["bypass"]) * 2), abs=1e-3)
    assert sum(row["metric"] == "tokens_per_s" for row in rows) == len(_points())


@pytest.mark.parametrize("has_bypass", [True, False])
def test_picture_from_rows_alone(has_bypass: bool, tmp_path: Path) -> None:
    """Fails if a results file gives no picture, or none for an artifact without bypass."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "docs" / "union.png"
    plot_union(_rows(has_bypass), out)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_rows_of_something_else_are_not_drawn(tmp_path: Path) -> None:
    """Fails if rows without figures of a union give an empty picture."""
    with pytest.raises(SystemExit, match="nothing to draw"):
        plot_union([{"metric": "tokens_per_s", "variant": "stock"}], tmp_path / "union.png")
