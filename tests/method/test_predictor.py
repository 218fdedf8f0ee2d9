"""Tests of the Budget Predictor: the effect of its price, and its folded form."""

import sys

import numpy as np
import pytest
import torch

from tests.harness.tiny_models import NUM_LAYERS, random_prompts
from tests.method.conftest import Tiny
from vllm_buddy.method import BudgetPredictor, FoldedPredictor
from vllm_buddy.method.decision import value_table

DEPTHS = (3, 4, 6, NUM_LAYERS)
# Tables are rounded to 8 bits. Hidden values have magnitude 1, and r of them are multiplied by weights of 0.3.
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def predictor(tiny: Tiny) -> tuple[BudgetPredictor, torch.Tensor]:
    values = value_table(tiny.model)
    torch.manual_seed(0)
    module = BudgetPredictor(values.shape[1], DEPTHS, NUM_LAYERS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return module, values


def test_folded_excess_equals_the_module(predictor: tuple[BudgetPredictor, torch.Tensor]) -> None:
    """Fails if the folded form sums the differences from the wrong end, so that hard requests get the fewest layers."""
    module, values = predictor
    folded = FoldedPredictor.fold(module, values, NUM_LAYERS)
    for prompt in random_prompts(5):
        rows = values[prompt]
        with torch.no_grad():
            wanted = module.excess(rows.mean(dim=0), rows[-1]).numpy()
        assert np.abs(folded.excess(prompt) - wanted).max() < TOLERANCE
        assert folded.excess(prompt)[-1] == 0.0


def test_a_higher_price_never_takes_a_greater_depth(predictor: tuple[BudgetPredictor, torch.Tensor]) -> None:
    """Fails if a higher price chooses a greater depth, which makes a busy server slower."""
    folded = FoldedPredictor.fold(*predictor, NUM_LAYERS)
    taken = set()
    for prompt in random_prompts(20, seed=1):
        excess = folded.excess(prompt)
        chosen = [folded.depth(excess, price, DEPTHS) for price in np.linspace(0, 20, 201)]
        assert chosen == sorted(chosen, reverse=True)
        assert (chosen[0], chosen[-1]) == (DEPTHS[-1], DEPTHS[0])
        taken |= set(chosen)
    assert len(taken) > 2


def test_the_policy_is_most_likely_where_serving_goes(predictor: tuple[BudgetPredictor, torch.Tensor]) -> None:
    """Fails if the trained policy is most likely at another depth than the cheapest one, which serving chooses."""
    module, values = predictor
    folded = FoldedPredictor.fold(module, values, NUM_LAYERS)
    for prompt in random_prompts(10, seed=2):
        excess = folded.excess(prompt)
        for price in (0.0, 0.7, 2.0, 9.0):
            log_pi = module.log_policy(torch.from_numpy(excess), torch.tensor(price), temperature=0.1)
            assert DEPTHS[int(log_pi.argmax())] == folded.depth(excess, price, DEPTHS)
            assert float(log_pi.exp().sum()) == pytest.approx(1.0)


def test_of_equal_costs_the_greatest_depth_is_taken() -> None:
    """Fails if a request whose loss does not depend on depth gets fewer than all layers at price 0."""
    folded = FoldedPredictor(None, DEPTHS, NUM_LAYERS)  # type: ignore[arg-type]
    assert folded.depth(np.zeros(4), 0.0, DEPTHS) == NUM_LAYERS
    assert folded.depth(np.array([0.5, 0.375, 0.125, 0.0]), 1.0, (4, 6)) == 6


def test_the_largest_price_there_is_takes_the_fewest_layers() -> None:
    """Fails if the largest finite price overflows, so that all depths cost the same and the greatest is chosen."""
    folded = FoldedPredictor(None, DEPTHS, NUM_LAYERS)  # type: ignore[arg-type]
    assert folded.depth(np.array([3.0, 2.0, 1.0, 0.0]), sys.float_info.max, DEPTHS) == 3
