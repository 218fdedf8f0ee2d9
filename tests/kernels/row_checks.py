"""Expected values of a row in the tests of gather_rows and scatter_rows: its sum and norm, rounded as in vLLM."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# Relative, for normed. fp32: sums of thousands of squares in another order. 16 bits: the definition does not round, the
# op rounds twice, each time by at most one unit in the last place, 2**-7 (bfloat16) or 2**-10 (float16).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
# Relative, for the state, one rounded sum: exact, except that Triton's interpreter truncates where bfloat16 rounds.
STATE_TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 2**-7 if DEVICE == "cpu" else 0.0, torch.float16: 0.0}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def norm_of(state: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the RMSNorm by its definition, in float64."""
    wide = state.double()
    return wide / (wide.square().mean(1, keepdim=True) + EPS).sqrt() * weight.double()


def right_state(state: torch.Tensor, definition: torch.Tensor) -> bool:
    return torch.allclose(state, definition, rtol=STATE_TOLERANCE[state.dtype], atol=0)


def right_norm(normed: torch.Tensor, definition: torch.Tensor) -> bool:
    return torch.allclose(normed.double(), definition, rtol=TOLERANCE[normed.dtype], atol=0)
