"""The Budget Predictor: its dial, and its folded form."""

import sys

import numpy as np
import pytest
import torch

from tests.harness.tiny_models import NUM_LAYERS, random_prompts
from tests.method.conftest import Tiny
from vllm_buddy.method import BudgetPredictor, FoldedPredictor
from vllm_buddy.method.decision import value_table

DEPTHS = (3, 4, 6, NUM_LAYERS)
# Tables are rounded to 8 bits; hidden values are of order one, and r of them meet weights of 0.3.
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
    """Failure: serving sums the steps from the wrong end, and gives hard requests the fewest layers."""
    module, values = predictor
    folded = FoldedPredictor.fold(module, values, NUM_LAYERS)
    for prompt in random_prompts(5):
        rows = values[prompt]
        with torch.no_grad():
            wanted = module.excess(rows.mean(dim=0), rows[-1]).numpy()
        assert np.abs(folded.excess(prompt) - wanted).max() < TOLERANCE
        assert folded.excess(prompt)[-1] == 0.0


def test_a_higher_price_never_takes_a_greater_depth(predictor: tuple[BudgetPredictor, torch.Tensor]) -> None:
    """A dial that turns back makes a busy server slower."""
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
    """What is trained is the log policy; what is served is the cheapest depth."""
    module, values = predictor
    folded = FoldedPredictor.fold(module, values, NUM_LAYERS)
    for prompt in random_prompts(10, seed=2):
        excess = folded.excess(prompt)
        for price in (0.0, 0.7, 2.0, 9.0):
            log_pi = module.log_policy(torch.from_numpy(excess), torch.tensor(price), temperature=0.1)
            assert DEPTHS[int(log_pi.argmax())] == folded.depth(excess, price, DEPTHS)
            assert float(log_pi.exp().sum()) == pytest.approx(1.0)


def test_of_equal_costs_the_greatest_depth_is_taken() -> None:
    """At price 0 a request whose loss does not depend on depth must get all layers, as price 0 promises."""
    folded = FoldedPredictor(None, DEPTHS, NUM_LAYERS)  # type: ignore[arg-type]
    assert folded.depth(np.zeros(4), 0.0, DEPTHS) == NUM_LAYERS
    assert folded.depth(np.array([0.5, 0.375, 0.125, 0.0]), 1.0, (4, 6)) == 6


def test_the_largest_price_there_is_takes_the_fewest_layers() -> None:
    """Overflow to infinity makes all depths cost the same, and the greatest is taken."""
    folded = FoldedPredictor(None, DEPTHS, NUM_LAYERS)  # type: ignore[arg-type]
    assert folded.depth(np.array([3.0, 2.0, 1.0, 0.0]), sys.float_info.max, DEPTHS) == 3
