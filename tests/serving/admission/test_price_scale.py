"""From a level to the price that leads recent prompts to it."""

import numpy as np
import pytest

from vllm_buddy.method import FoldedDecision, FoldedPredictor
from vllm_buddy.serving.admission.price_scale import PriceScale, _thresholds

DEPTHS = (15, 18, 22, 26, 30)
NUM_LAYERS = 30


def predictor() -> FoldedPredictor:
    empty = np.zeros((1, 1), np.float32)
    decision = FoldedDecision(
        empty, empty, np.zeros(1, np.float32), np.zeros((4, 1), np.float32), np.zeros(4, np.float32)
    )
    return FoldedPredictor(decision, DEPTHS, NUM_LAYERS)


def drawn_excess(count: int, seed: int) -> list[np.ndarray]:
    """Falling with depth, not convex: some depths are never the cheapest."""
    gaps = np.random.default_rng(seed).exponential(0.3, (count, len(DEPTHS) - 1))
    return [np.append(row[::-1].cumsum()[::-1], 0.0) for row in gaps]


def mean_depth(prompts: list[np.ndarray], price: float) -> float:
    return float(np.mean([predictor().depth(excess, price, DEPTHS) for excess in prompts]))


@pytest.mark.parametrize("seed", range(20))
def test_a_threshold_is_where_the_predictor_goes_down(seed: int) -> None:
    """Fails if the price of a depth is not the one at which the predictor chooses it, where some are never chosen."""
    (excess,) = drawn_excess(1, seed)
    for depth, threshold in zip(DEPTHS, _thresholds(excess, np.asarray(DEPTHS, float), NUM_LAYERS)):
        assert predictor().depth(excess, threshold * (1 + 1e-6), DEPTHS) <= depth
        assert predictor().depth(excess, threshold * (1 - 1e-6), DEPTHS) > depth


@pytest.mark.parametrize("base", [0.0, 0.7])
def test_the_price_is_the_least_that_leads_to_the_mean_depth(base: float) -> None:
    """Fails if a level takes more depth away than it asks for, or less."""
    scale, prompts = PriceScale(DEPTHS, NUM_LAYERS, base), drawn_excess(40, 3)
    for excess in prompts:
        scale.add(excess)
    calm = mean_depth(prompts, base)
    for level in (0.05, 0.3, 0.7, 1.0):
        wanted, price = calm - level * (calm - DEPTHS[0]), scale.price(level)
        assert mean_depth(prompts, price) <= wanted + 1e-6 < mean_depth(prompts, price * (1 - 1e-6))
    assert scale.price(0.0) == base
    assert mean_depth(prompts, scale.price(1.0)) == DEPTHS[0]


def test_only_recent_prompts_count() -> None:
    """Fails if the traffic of yesterday decides the price of today."""
    scale = PriceScale(DEPTHS, NUM_LAYERS, 0.0)
    cheap, dear = drawn_excess(1, 0)[0] * 0.01, drawn_excess(1, 1)[0] * 100
    for excess in (*[dear] * 100, *[cheap] * 64):
        scale.add(excess)
    assert scale.price(1.0) < 1
    scale.add(dear)
    assert scale.price(1.0) > 10


def test_without_prompts_the_price_is_that_without_load() -> None:
    """Fails if a server that has had no request with budget "auto" has no price."""
    assert PriceScale(DEPTHS, NUM_LAYERS, 0.3).price(1.0) == 0.3
