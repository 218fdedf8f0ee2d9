"""Tests of the bypass of a skipped layer."""

import pytest
import torch

from vllm_buddy.method.bypass import Bypass

NUM_MIDDLE, RANK, HIDDEN = 3, 2, 8
EPS = 1e-5
TOLERANCE = 1e-5  # fp32 sums of 8 products of magnitude 1


@pytest.fixture
def bypass() -> Bypass:
    torch.manual_seed(0)
    return Bypass(torch.randn(NUM_MIDDLE, RANK, HIDDEN), torch.randn(NUM_MIDDLE, HIDDEN, RANK), EPS)


@pytest.mark.parametrize("layer", range(1, NUM_MIDDLE + 1))
def test_formula(bypass: Bypass, layer: int) -> None:
    """Fails if a bypass uses weights of the adjacent layer, a norm over another axis, or epsilon outside the root."""
    hidden = torch.randn(4, 5, HIDDEN)
    x = hidden.double() / (hidden.double().square().mean(dim=-1, keepdim=True) + EPS).sqrt()
    inner = x @ bypass.down[layer - 1].double().T
    wanted = hidden.double() + (inner * torch.sigmoid(inner)) @ bypass.up[layer - 1].double().T
    torch.testing.assert_close(bypass.apply(layer, hidden), wanted.float(), atol=TOLERANCE, rtol=0)


def test_dtype_of_the_model(bypass: Bypass) -> None:
    """Fails if a bypass returns a bf16 model's hidden state in float32, which the next layer refuses."""
    hidden = torch.randn(4, HIDDEN, dtype=torch.bfloat16)
    assert bypass.to(hidden).apply(1, hidden).dtype == torch.bfloat16
    assert bypass.rank == bypass.to(hidden).rank == RANK
