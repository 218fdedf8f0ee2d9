"""Tests the predicted cost of a step of mixed budgets."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_buddy.method import full_path, path_of

pytest.importorskip("vllm")
from benchmarks.harness.rounds import Rounds
from benchmarks.speed import mixed
from benchmarks.speed.mixed import BUDGETS, predicted_ms, result_rows

NUM_LAYERS = 8
NESTED = {1.0: full_path(8), 0.75: path_of([0, 1, 2, 3, 4, 7]), 0.5: path_of([0, 1, 2, 7])}


def _lineup() -> Any:
    depths = {1.0: 8, 0.75: 6, 0.5: 4}
    return SimpleNamespace(
        num_layers=NUM_LAYERS,
        router=SimpleNamespace(full=NESTED[1.0]),
        depth=lambda budget: depths[budget],
        path=lambda depth: {d: NESTED[b] for b, d in depths.items()}[depth],
        about=lambda: {},
    )


def test_every_layer_counts_with_the_rows_that_run_it() -> None:
    """Fails if the prediction forgets that a layer runs on part of the batch, or its bypass on the rest."""
    layer = {n: np.array([float(n)]) for n in (8, 16, 24)}
    bypass = {n: np.array([0.1 * n]) for n in (8, 16, 24)}
    # Layers 0, 1, 2, 7 on all 24 rows; 3 and 4 on 16, bypass on 8; 5 and 6 on 8, bypass on 16.
    expected = 100 + 4 * 24 + 2 * (16 + 0.8) + 2 * (8 + 1.6)
    found = predicted_ms(_lineup(), 8, layer, bypass, np.array([100.0]))
    np.testing.assert_allclose(found, [expected])


def test_costs_are_recovered_from_homogeneous_runs() -> None:
    """Fails if the costs of layer, bypass and rest that the prediction uses are not those of the runs."""
    rounds = Rounds(1)

    def step(layers: int, rows: int, bypassed: int) -> float:
        return 2.0 + layers * (1 + rows / 10) + bypassed * (0.1 + rows / 100)

    variants = {
        "full": SimpleNamespace(name="buddy 1.0", layers=8),
        "half": SimpleNamespace(name="buddy 0.5", layers=4),
        "bare": SimpleNamespace(name="buddy 0.5, no bypass", layers=4),
    }
    times = {mixed.MIXED: 2.0 + 4 * 3.4 + 2 * (2.6 + 0.18) + 2 * (1.8 + 0.26), "buddy 0.75 x 8": step(6, 8, 2)}
    for rows in (8, 16, 24):
        times[f"buddy 1.0 x {rows}"] = step(8, rows, 0)
        times[f"buddy 0.5 x {rows}"] = step(4, rows, 4)
        times[f"buddy 0.5, no bypass x {rows}"] = step(4, rows, 0)
    for name, ms in times.items():
        rounds.add(0, name, ms_per_step=ms)
    for budget in BUDGETS:
        rounds.add(0, mixed.class_name(budget), first_token_step=0, steps_per_token=1)
        times[mixed.class_name(budget)] = 0
    rounds.mark_checked(times)
    rows_found = result_rows(_lineup(), rounds, 8, [variants[key] for key in ("full", "half", "bare")])
    found = {(row["metric"], row["variant"]): row["p50"] for row in rows_found}
    assert found["of_predicted", "mixed"] == pytest.approx(1.0, abs=1e-3)
    assert found["layer_ms", "on 16 rows"] == pytest.approx(2.6)
    assert found["bypass_ms", "on 8 rows"] == pytest.approx(0.18)
