"""Tests the rows and figures of the split of a step."""

import numpy as np
import pytest

from benchmarks.harness.rounds import Refused, Rounds
from benchmarks.speed.profile_step import print_split, split_figures, split_rows
from benchmarks.speed.step_parts import PARTS
from vllm_buddy.method import Router, full_path

NUM_LAYERS = 6


class FakeLineup:
    def about(self) -> dict[str, str]:
        return {"artifact": "none"}


class FakeVariant:
    name = "buddy 1.0"
    budget = 1.0
    layers = NUM_LAYERS
    router = Router(NUM_LAYERS, np.zeros(NUM_LAYERS - 2))


def _rounds(*, checked: bool = True) -> Rounds:
    rounds = Rounds(2)
    rng = np.random.default_rng(0)
    for index in range(2):
        steps = [dict(zip(PARTS, rng.random(len(PARTS)).tolist())) for _ in range(5)]
        rounds.add(index, "buddy 1.0", **split_figures([4.0, 6.0, 50.0], steps))
    if checked:
        rounds.mark_checked(["buddy 1.0"])
    return rounds


def test_parts_of_a_round_sum_to_the_mean_step() -> None:
    """Fails if parts are medians, which do not sum to a step: the router, asked every 16 steps, would take no time."""
    steps = [dict.fromkeys(PARTS, 1.0) for _ in range(16)]
    steps[7]["router"] = 17.0
    figures = split_figures([10.0, 20.0, 60.0], steps)
    assert figures["router"] == 2.0
    assert sum(figures[part] for part in PARTS) == pytest.approx(np.mean([sum(s.values()) for s in steps]))
    assert figures["step_ms"] == 30.0
    assert figures["instrumented_ratio"] == pytest.approx(len(PARTS) / 20)


def test_rows_say_what_they_are_of() -> None:
    """Fails if rows cannot be told apart, or shares do not refer to the step."""
    rows = split_rows(_rounds(), FakeVariant(), 8, FakeLineup())
    assert len({(row["metric"], row.get("part")) for row in rows}) == len(rows) == 2 + 2 * len(PARTS)
    for row in rows:
        about = {key: row[key] for key in ("batch", "layers", "union_layers", "distinct_paths", "n")}
        assert about == {"batch": 8, "layers": 6, "union_layers": 6, "distinct_paths": 1, "n": 2}
    shares = [row for row in rows if row["metric"] == "part_share"]
    # The median of two rounds is their mean, so that here medians sum.
    assert sum(row["p50"] for row in shares) == pytest.approx(1, abs=1e-4 * len(PARTS))
    assert full_path(NUM_LAYERS).bit_count() == rows[0]["union_layers"]


def test_nothing_is_shown_that_was_not_checked() -> None:
    """Fails if an engine that computes something else has figures."""
    with pytest.raises(Refused, match="not checked"):
        split_rows(_rounds(checked=False), FakeVariant(), 8, FakeLineup())


def test_the_table_holds_all_parts(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a part is measured and not printed."""
    print_split(split_rows(_rounds(), FakeVariant(), 8, FakeLineup()))
    printed = capsys.readouterr().out
    for name in (*PARTS, "buddy 1.0", "batch 8", "step_ms", "instrumented_ratio"):
        assert name in printed
