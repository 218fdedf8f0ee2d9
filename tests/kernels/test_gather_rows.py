"""Tests gather_rows: the rows that run a layer, with residual add and RMSNorm."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm_buddy_kernels.gather_rows import _gather_rows, gather_rows, gather_rows_reference
from vllm_buddy_kernels.triton_import import KernelError

from tests.kernels.row_checks import DEVICE, DTYPES, EPS, norm_of, right_norm, right_state

Op = Callable[..., Any]
OPS = pytest.mark.parametrize("op", [gather_rows, gather_rows_reference])
# (num_tokens, num_rows, hidden_size)
SHAPES = [(1, 1, 64), (5, 0, 64), (0, 0, 64), (80, 63, 96), (257, 257, 63), (3, 9, 1)]
if DEVICE == "cuda":
    SHAPES += [(128, 32, 4096), (2048, 1500, 4096), (8, 8, 3584), (8, 5, 576), (4, 4, 16384)]


def make(num_tokens: int, hidden_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden, residual and weight."""
    torch.manual_seed(num_tokens + hidden_size)
    sizes = torch.tensor([0.01, 1, 30]).repeat(num_tokens)[:num_tokens, None]  # small rows, where eps counts
    hidden, residual = (torch.randn(num_tokens, hidden_size) * sizes for _ in range(2))
    weight = 1 + 0.3 * torch.randn(hidden_size)
    return hidden.to(DEVICE, dtype), residual.to(DEVICE, dtype), weight.to(DEVICE, dtype)


@OPS
@DTYPES
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(
    op: Callable[..., Any], shape: tuple[int, int, int], with_residual: bool, dtype: torch.dtype
) -> None:
    """Fails if a row is the wrong one, is not written, or its norm is not that of the rounded sum."""
    num_tokens, num_rows, hidden_size = shape
    hidden, residual, weight = make(num_tokens, hidden_size, dtype)
    rows = torch.randperm(max(num_tokens, 1)).repeat(3)[:num_rows].to(DEVICE, torch.int32 if num_rows % 2 else None)
    normed, state = op(hidden, residual if with_residual else None, rows, weight, EPS)
    assert normed.dtype == state.dtype == dtype
    assert right_state(state, (hidden + residual if with_residual else hidden)[rows.long()])
    assert right_norm(normed, norm_of(state, weight))


@OPS
def test_rounding_order(op: Op) -> None:
    """Fails if the normed row is multiplied by the weight before it is rounded, which vLLM does not do."""
    hidden, residual, weight = make(20, 96, torch.float16)
    normed, state = op(hidden, residual, torch.arange(20, device=DEVICE), weight, EPS)
    wide = state.float()
    wide = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + EPS)
    as_vllm = wide.half() * weight
    assert (normed == as_vllm).float().mean() > 0.99
    assert (normed == (wide * weight.float()).half()).float().mean() < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_answers_are_noticed(dtype: torch.dtype) -> None:
    """Fails if the tolerance lets an op pass that forgets the weight, the epsilon or the residual."""
    hidden, residual, weight = make(6, 96, dtype)
    rows = torch.arange(6, device=DEVICE)
    definition = norm_of(hidden + residual, weight)
    for wrong in ((residual, torch.ones_like(weight), EPS), (residual, weight, 0.0), (None, weight, EPS)):
        normed, state = gather_rows(hidden, wrong[0], rows, *wrong[1:])
        assert not right_norm(normed, definition)
    assert not right_state(state, hidden + residual)


def test_rows_of_wider_buffers() -> None:
    """Fails if a row stride is mistaken for hidden_size, or memory beside the rows is read."""
    hidden, residual, weight = make(7, 63, torch.float32)
    rows = torch.tensor([6, 0, 3], device=DEVICE)
    wide, wider = (torch.full((7, width), float("nan"), device=DEVICE) for width in (70, 80))
    wide[:, :63], wider[:, 5:68] = hidden, residual
    got = gather_rows(wide[:, :63], wider[:, 5:68], rows, weight, EPS)
    torch.testing.assert_close(got, gather_rows(hidden, residual, rows, weight, EPS), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, lambda t: t.double(), "hidden is torch.float64"),
        (0, lambda t: t.T, "contiguous rows is wanted"),
        (1, lambda t: t.bfloat16(), "residual is torch.bfloat16"),
        (1, lambda t: t[:-1], r"residual is \[5, 64\], hidden \[6, 64\]"),
        (1, lambda t: t[:, :-1], r"\[\*, 64\] with contiguous rows"),
        (2, lambda t: t.float(), "rows is torch.float32"),
        (2, lambda t: t[::2], "contiguous"),
        (3, lambda t: t[:-1], r"weight is .* shape \[63\]"),
        (3, lambda t: t.double(), "weight is torch.float64"),
        (3, lambda t: t.to("meta"), "on meta"),
    ],
)
def test_errors(index: int, wrong: Callable[[Any], Any], message: str) -> None:
    """Fails if a wrong tensor reaches the kernel, where it would be read out of bounds."""
    hidden, residual, weight = make(6, 64, torch.float32)
    arguments: list[Any] = [hidden, residual, torch.arange(6, device=DEVICE), weight, EPS]
    arguments[index] = wrong(arguments[index])
    with pytest.raises(KernelError, match=message):
        gather_rows(*arguments)


@pytest.mark.parametrize("with_residual", [True, False])
def test_op(with_residual: bool) -> None:
    """Fails if the op changes its inputs, returns one of them, or differs from its fake in shape or dtype."""
    hidden, residual, weight = make(6, 64, torch.bfloat16)
    arguments = hidden, residual if with_residual else None, torch.tensor([4, 1], device=DEVICE), weight, EPS
    torch.library.opcheck(_gather_rows, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(DEVICE != "cuda", reason="captures a CUDA graph")
def test_captured() -> None:
    """Fails if a replay gathers the rows of the capture."""
    hidden, residual, weight = make(64, 4096, torch.bfloat16)
    rows = torch.arange(8, device=DEVICE)
    gather_rows(hidden, residual, rows, weight, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gather_rows(hidden, residual, rows, weight, EPS)
    rows.copy_(torch.arange(40, 48))
    graph.replay()
    torch.testing.assert_close(captured, gather_rows(hidden, residual, rows, weight, EPS), rtol=0, atol=0)
