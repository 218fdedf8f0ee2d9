"""The comparison of chosen budgets with constant budgets and with the best choice."""

import numpy as np
import pytest

from vllm_buddy.evaluation.cost_quality import Hindsight, choices, compare

DEPTHS = (4, 6, 8)
# Two kinds of requests: the first five gain nothing from layers, the others gain one nat.
TWO_KINDS = np.array([[2.0, 2.0, 2.0]] * 5 + [[3.0, 2.5, 2.0]] * 5)


def test_the_best_choice_gets_all_of_the_way() -> None:
    """Fails if the best possible choice, half the requests at 4 layers and half at 8, does not count as the best."""
    chosen = np.array([0] * 5 + [2] * 5)
    found = compare(TWO_KINDS, DEPTHS, chosen)
    assert (found.layers, found.loss, found.constant, found.best) == (6.0, 2.0, 2.25, 2.0)
    assert found.share_of_best == 1.0


def test_a_constant_budget_gains_nothing() -> None:
    """Fails if a constant budget has a gain over itself."""
    for index in range(len(DEPTHS)):
        found = compare(TWO_KINDS, DEPTHS, np.full(10, index))
        assert found.gain == pytest.approx(0.0)
        assert found.stderr == pytest.approx(0.0)


def test_chance_gains_nothing_and_the_standard_error_says_so() -> None:
    """Fails if random depths, which are a mixture of constant budgets, have a gain, or its standard error is wrong."""
    rng = np.random.default_rng(0)
    losses = rng.normal(2.0, 0.5, (4000, 1)) + np.array([1.0, 0.6, 0.2]) + rng.normal(0, 0.1, (4000, 3))
    gains = []
    for _ in range(40):
        found = compare(losses, DEPTHS, rng.integers(0, 3, 4000))
        gains.append(found.gain / found.stderr)
    assert abs(np.mean(gains)) < 0.6  # not 0, because all 40 draws share their samples
    assert 0.5 < np.std(gains) < 1.5


def test_a_bent_curve_of_constant_budgets_is_mixed_around() -> None:
    """Fails if choices are compared with depth 6 where a mixture of depths 4 and 8 is better."""
    losses = np.tile([2.0, 1.9, 1.0], (10, 1))
    found = compare(losses, DEPTHS, np.full(10, 1))
    assert found.constant == pytest.approx(1.5)
    assert found.gain == pytest.approx(-0.4)


def test_no_choice_of_as_many_layers_beats_the_best() -> None:
    """Fails if some choice beats the best choice of as many layers."""
    rng = np.random.default_rng(1)
    losses = rng.normal(2.0, 1.0, (7, 3))
    best = Hindsight.of(losses, DEPTHS)
    for combination in np.ndindex(*[3] * 7):
        chosen = np.array(combination)
        layers = np.asarray(DEPTHS)[chosen].mean()
        assert losses[np.arange(7), chosen].mean() >= best.loss(layers) - 1e-9


def test_the_best_choice_reaches_the_shallowest_depth_at_any_loss() -> None:
    """Fails if the best choice of few layers is that of more, where skipping costs many nats."""
    losses = np.tile([9.0 + 60.0, 4.0, 0.0], (10, 1))
    best = Hindsight.of(losses, DEPTHS)
    assert best.loss(DEPTHS[0]) == pytest.approx(69.0)
    assert best.loss((DEPTHS[0] + DEPTHS[1]) / 2) == pytest.approx((69.0 + 4.0) / 2)


def test_price_zero_takes_the_least_loss_and_a_huge_price_the_fewest_layers() -> None:
    """Fails if a higher price chooses more layers."""
    assert choices(TWO_KINDS, DEPTHS, 8, 0.0).tolist() == [2] * 10  # of equal costs the greatest depth
    assert choices(TWO_KINDS, DEPTHS, 8, 100.0).tolist() == [0] * 10
    assert choices(TWO_KINDS, DEPTHS, 8, 1.0).tolist() == [0] * 5 + [2] * 5
