"""Tests scatter_rows: rows that ran a layer merged with those that skipped it, with residual add and RMSNorm."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm_buddy_kernels.scatter_rows import _scatter_rows, scatter_rows, scatter_rows_reference
from vllm_buddy_kernels.triton_import import KernelError

from tests.kernels.row_checks import DEVICE, DTYPES, EPS, norm_of, right_norm, right_state

Op = Callable[..., Any]
OPS = pytest.mark.parametrize("op", [scatter_rows, scatter_rows_reference])
# (num_tokens, num_rows, hidden_size)
SHAPES = [(1, 1, 64), (1, 0, 64), (0, 0, 64), (63, 63, 96), (257, 100, 63)]
if DEVICE == "cuda":
    SHAPES += [(128, 32, 4096), (2048, 1500, 4096), (8, 8, 3584), (8, 5, 576)]


def make(num_tokens: int, num_rows: int, hidden_size: int, dtype: torch.dtype) -> list[Any]:
    """Return hidden_rows, residual_rows, source, hidden, residual, weight. Rows that must not be read are NaN."""
    torch.manual_seed(num_tokens + hidden_size)
    rows = [torch.randn(num_rows + 1, hidden_size) for _ in range(2)]
    states = [torch.randn(num_tokens, hidden_size) for _ in range(2)]
    source = torch.full((num_tokens,), -1, dtype=torch.int32)
    source[torch.randperm(num_tokens)[:num_rows]] = torch.randperm(num_rows).int()
    for tensor in rows:
        tensor[num_rows:] = float("nan")
    for tensor in states:
        tensor[source >= 0] = float("nan")
    weight = 1 + 0.3 * torch.randn(hidden_size)
    made = [*(tensor[:num_rows] for tensor in rows), source, *states, weight]
    return [t.to(DEVICE) if t is source else t.to(DEVICE, dtype) for t in made]


def merged(
    hidden_rows: torch.Tensor,
    residual_rows: torch.Tensor,
    source: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Return the state by its definition, token by token."""
    state = torch.empty_like(hidden)
    for token, row in enumerate(source.tolist()):
        if row >= 0:
            state[token] = hidden_rows[row] + residual_rows[row]
        else:
            state[token] = hidden[token] if residual is None else hidden[token] + residual[token]
    return state


@OPS
@DTYPES
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(
    op: Callable[..., Any], shape: tuple[int, int, int], with_residual: bool, dtype: torch.dtype
) -> None:
    """Fails if a token gets another token's row, the wrong pair is read (it is NaN), or a row is not written."""
    *inputs, residual, weight = make(*shape, dtype)
    inputs.append(residual if with_residual else None)
    normed, state = op(*inputs, weight, EPS)
    assert not state.isnan().any()
    assert normed.dtype == state.dtype == dtype
    assert right_state(state, merged(*inputs))
    assert right_norm(normed, norm_of(state, weight))


@OPS
def test_without_norm(op: Op) -> None:
    """Fails if the state depends on whether a norm is asked for, or there is a norm without a weight."""
    *inputs, weight = make(9, 4, 64, torch.bfloat16)
    normed, state = op(*inputs, None, EPS)
    assert normed is None
    assert torch.equal(state, op(*inputs, weight, EPS)[1])


@OPS
def test_a_row_for_several_tokens(op: Op) -> None:
    """Fails if rows are written to the tokens they came from instead of read by each token."""
    hidden_rows, residual_rows, source, *rest, weight = make(5, 5, 64, torch.float32)
    source.fill_(2)
    _, state = op(hidden_rows, residual_rows, source, *rest, weight, EPS)
    assert torch.equal(state, (hidden_rows[2] + residual_rows[2]).expand(5, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_answers_are_noticed(dtype: torch.dtype) -> None:
    """Fails if the tolerance lets an op pass that forgets the weight, a residual, or which row is whose."""
    hidden_rows, residual_rows, source, hidden, residual, weight = make(9, 5, 96, dtype)
    definition = norm_of(merged(hidden_rows, residual_rows, source, hidden, residual), weight)
    for wrong in (
        (hidden_rows, residual_rows, source, hidden, residual, torch.ones_like(weight)),
        (hidden_rows, residual_rows, source, hidden, None, weight),
        (hidden_rows, torch.zeros_like(residual_rows), source, hidden, residual, weight),
        (hidden_rows.roll(1, 0), residual_rows.roll(1, 0), source, hidden, residual, weight),
    ):
        normed, _ = scatter_rows(*[*wrong, EPS])
        assert normed is not None
        assert not right_norm(normed, definition)


def test_rows_of_wider_buffers() -> None:
    """Fails if a row stride is mistaken for hidden_size, or memory beside the rows is read."""
    inputs = make(7, 3, 63, torch.float32)
    wide: list[Any] = []
    for tensor in inputs:
        if tensor.dim() == 2:
            buffer = torch.full((len(tensor), 80 + len(wide)), float("nan"), device=DEVICE)
            buffer[:, 2:65] = tensor
            tensor = buffer[:, 2:65]
        wide.append(tensor)
    torch.testing.assert_close(scatter_rows(*[*wide, EPS]), scatter_rows(*[*inputs, EPS]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, lambda t: t.bfloat16(), "hidden_rows is torch.bfloat16"),
        (1, lambda t: t[:-1], r"residual_rows is \[3, 64\], hidden_rows \[4, 64\]"),
        (1, lambda t: t[:, :-1], "residual_rows has shape"),
        (2, lambda t: t.long(), "source is torch.int64"),
        (2, lambda t: t[:-1], r"source is .* shape \[8\]"),
        (3, lambda t: t.int(), "hidden is torch.int32"),
        (4, lambda t: t[1:], "residual is"),
        (5, lambda t: t.bfloat16(), "weight is torch.bfloat16"),
    ],
)
def test_errors(index: int, wrong: Callable[[Any], Any], message: str) -> None:
    """Fails if a wrong tensor reaches the kernel, where it would be read out of bounds."""
    arguments = [*make(9, 4, 64, torch.float32), EPS]
    arguments[index] = wrong(arguments[index])
    with pytest.raises(KernelError, match=message):
        scatter_rows(*arguments)


@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_op(with_residual: bool, with_weight: bool) -> None:
    """Fails if the op changes its inputs, returns one of them, or differs from its fake in shape or dtype."""
    *inputs, residual, weight = make(6, 2, 64, torch.bfloat16)
    arguments = *inputs, residual if with_residual else None, weight if with_weight else None, EPS
    torch.library.opcheck(_scatter_rows, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(DEVICE != "cuda", reason="captures a CUDA graph")
def test_captured() -> None:
    """Fails if a replay divides the tokens as at the capture."""
    hidden_rows, residual_rows, source, hidden, residual, weight = make(64, 64, 4096, torch.bfloat16)
    hidden, residual = hidden.nan_to_num(1.0), residual.nan_to_num(2.0)
    arguments = hidden_rows, residual_rows, source, hidden, residual, weight, EPS
    scatter_rows(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scatter_rows(*arguments)
    source[::3] = -1
    graph.replay()
    torch.testing.assert_close(captured, scatter_rows(*arguments), rtol=0, atol=0)
