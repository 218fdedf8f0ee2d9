"""Tests bypass_rows: the low-rank repair of rows that skip a layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm_buddy_kernels.bypass_rows import (
    BLOCK_ROWS,
    MAX_RANK,
    NUM_STAGES,
    STAGES_BYTES,
    _bypass_rows,
    bypass_launch,
    bypass_rows,
    bypass_rows_reference,
)
from vllm_buddy_kernels.triton_import import KernelError, tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# Relative to the largest change of the bypass. fp32: sums in another order. 16 bits: the kernel rounds the inner values
# and the change; the reference also rounds the normed row, which the kernel never forms because it applies the norm's
# factor after the product, and that product. Each is at most 2**-8 (bfloat16) or 2**-11 (float16), and they add up.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
# Relative to the two terms of the last sum, for its rounding. Triton's interpreter truncates bfloat16, in the first
# sum as well.
LAST_PLACE = {torch.float32: 2**-23, torch.bfloat16: 2**-6 if DEVICE == "cpu" else 2**-8, torch.float16: 2**-11}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
Op = Callable[..., Any]
OPS = pytest.mark.parametrize("op", [bypass_rows, bypass_rows_reference])
# (num_tokens, hidden_size, rank)
SHAPES = [(0, 64, 16), (1, 64, 1), (63, 63, 5), (257, 96, 16), (17, 300, 24), (3, 16, 65)]
if DEVICE == "cuda":
    SHAPES += [(1, 4096, 64), (128, 4096, 64), (2048, 4096, 64), (32, 3584, 64), (32, 576, 64), (9, 4096, 128)]
    SHAPES += [(9, 4096, MAX_RANK)]


def make(num_tokens: int, hidden_size: int, rank: int, dtype: torch.dtype, share: float = 0.6) -> list[Any]:
    """Return hidden, residual, skips, down, up. Rows that run are NaN. The change is about as large as the state."""
    torch.manual_seed(num_tokens + hidden_size + rank)
    skips = torch.rand(num_tokens) < share
    skips[:1] = share > 0
    hidden, residual = (torch.randn(num_tokens, hidden_size) * 3 for _ in range(2))
    hidden[~skips] = residual[~skips] = float("nan")
    down = 2 * torch.randn(rank, hidden_size) / hidden_size**0.5
    up = 2 * torch.randn(hidden_size, rank) / rank**0.5
    return [t.to(DEVICE) if t is skips else t.to(DEVICE, dtype) for t in (hidden, residual, skips, down, up)]


def wanted(
    hidden: torch.Tensor, residual: torch.Tensor | None, skips: torch.Tensor, down: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the state before the layer and its change for the rows that skip, by the definition in float64."""
    before = (hidden if residual is None else hidden + residual)[skips].double()
    inner = before / (before.square().mean(1, keepdim=True) + EPS).sqrt() @ down.double().T
    return before, (inner * torch.sigmoid(inner)) @ up.double().T


def close(state: torch.Tensor, before: torch.Tensor, delta: torch.Tensor) -> bool:
    """Return whether the state of the rows that skip is right. state: of these rows."""
    most = delta.abs().max() if delta.numel() else 0.0
    bound = LAST_PLACE[state.dtype] * (before.abs() + delta.abs()) + TOLERANCE[state.dtype] * most
    return bool(((state.double() - before - delta).abs() <= bound).all())


@OPS
@DTYPES
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(
    op: Callable[..., Any], shape: tuple[int, int, int], with_residual: bool, dtype: torch.dtype
) -> None:
    """Fails if a row that skips is wrong, not written, or mixed with rows that do not skip, which are NaN."""
    hidden, residual, skips, down, up = make(*shape, dtype)
    arguments = hidden, residual if with_residual else None, skips, down, up
    state = op(*arguments, EPS)
    assert state.dtype == dtype
    assert state.shape == hidden.shape
    assert close(state[skips], *wanted(*arguments))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_and_none(share: float) -> None:
    """Fails if rows that run the layer are written, or rows are left out when all skip."""
    hidden, residual, skips, down, up = make(40, 64, 16, torch.float32, share)
    skips[BLOCK_ROWS : 2 * BLOCK_ROWS] = skips[5] = False
    state = bypass_rows(hidden, residual, skips, down, up, EPS)
    assert state[~skips].isnan().all()
    assert close(state[skips], *wanted(hidden, residual, skips, down, up))


@pytest.mark.skipif(DEVICE != "cpu", reason="watches Triton's interpreter")
def test_nothing_done_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a block of rows that all run the layer reads the weights."""

    def dot(*_: Any, **__: Any) -> None:
        raise RuntimeError("a product")

    hidden, residual, skips, down, up = make(40, 64, 16, torch.float32, 1.0)
    monkeypatch.setattr(tl, "dot", dot)
    bypass_rows(hidden, residual, torch.zeros_like(skips), down, up, EPS)
    with pytest.raises(Exception, match="a product"):
        bypass_rows(hidden, residual, skips, down, up, EPS)


def test_more_exact_than_the_reference() -> None:
    """Fails if intermediate values are rounded that need not be, which the tolerance would let pass."""
    hidden, residual, skips, down, up = make(48, 96, 16, torch.float16)
    before, delta = wanted(hidden, residual, skips, down, up)
    kernel, reference = (
        (op(hidden, residual, skips, down, up, EPS)[skips].double() - before - delta).square().mean().sqrt()
        for op in (bypass_rows, bypass_rows_reference)
    )
    assert kernel <= 1.02 * reference


@DTYPES
def test_independent_of_other_rows(dtype: torch.dtype) -> None:
    """Fails if a row's result depends on the number of tokens, its place, or which other rows skip."""
    hidden, residual, skips, down, up = make(40, 300, 24, dtype, 1.0)
    together = bypass_rows(hidden, residual, skips, down, up, EPS)
    # The interpreter's products come from numpy, whose rows do depend on their place.
    for token in (0, 16, 32) if DEVICE == "cpu" else (0, 21, 39):
        row = slice(token, token + 1)
        alone = bypass_rows(hidden[row], residual[row], skips[row], down, up, EPS)
        assert torch.equal(alone, together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_answers_are_noticed(dtype: torch.dtype) -> None:
    """Fails if the tolerance lets an op pass that forgets the residual, the norm's factor or the change itself."""
    hidden, residual, skips, down, up = make(20, 96, 16, dtype)
    definition = wanted(hidden, residual, skips, down, up)
    for wrong in ((None, down, up), (residual, down * 1.1, up), (residual, down, up * 1.1), (residual, down, 0 * up)):
        assert not close(bypass_rows(hidden, wrong[0], skips, *wrong[1:], EPS)[skips], *definition)
    assert not close(bypass_rows(hidden, residual, skips, down, up, 10.0)[skips], *definition)


def test_rows_of_wider_buffers() -> None:
    """Fails if a row stride is mistaken for a width, or memory beside the rows is read."""
    hidden, residual, skips, down, up = make(7, 63, 5, torch.float32)
    wide: list[torch.Tensor] = []
    for tensor in (hidden, residual, down, up):
        buffer = torch.full((len(tensor), 80 + len(wide)), float("nan"), device=DEVICE)
        buffer[:, 2 : 2 + tensor.shape[1]] = tensor
        wide.append(buffer[:, 2 : 2 + tensor.shape[1]])
    got = bypass_rows(wide[0], wide[1], skips, wide[2], wide[3], EPS)
    assert torch.equal(got[skips], bypass_rows(hidden, residual, skips, down, up, EPS)[skips])


@pytest.mark.parametrize("rank", [16, 64, 128, 256])
def test_a_device_with_less_shared_memory_gets_smaller_tiles(rank: int) -> None:
    """Fails if a GPU with 99 KiB is given the tiles of an H100, which do not fit."""
    usual, small = (bypass_launch(8, 4096, rank, 2, kib * 1024) for kib in (227, 99))
    assert small.block_in < usual.block_in
    assert NUM_STAGES * 2 * small.block_in * (small.block_rank + 2 * BLOCK_ROWS) <= 64 * 1024
    assert bypass_launch(8, 4096, rank, 2, 500 * 1024) == usual == bypass_launch(8, 4096, rank, 2)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rank", [1, 16, 60, 64, 200, MAX_RANK])
@pytest.mark.parametrize("hidden_size", [1, 63, 576, 3584, 4096, 8192])
def test_launch_table(hidden_size: int, rank: int, itemsize: int) -> None:
    """Fails if slices leave columns out, few rows stay on few SMs, or a row's order of sums follows the batch."""
    launches = {num_tokens: bypass_launch(num_tokens, hidden_size, rank, itemsize) for num_tokens in (1, 128, 8192)}
    for launch in launches.values():
        slices = -(-hidden_size // launch.columns)
        assert 1 <= slices <= 32
        assert launch.columns % launch.block_out == 0
        tiles = NUM_STAGES * itemsize * launch.block_in * (launch.block_rank + 2 * BLOCK_ROWS)
        assert tiles <= STAGES_BYTES
        assert launch.block_rank >= rank
        assert launch.block_in >= 16 <= launch.block_out
    assert launches[8192].columns >= hidden_size
    if hidden_size >= 2048:
        assert -(-hidden_size // launches[1].columns) >= 16
    orders = {(launch.block_rank, launch.block_in, launch.num_warps) for launch in launches.values()}
    assert len(orders) == 1


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, lambda t: t.double(), "hidden is torch.float64"),
        (1, lambda t: t[:-1], "residual is"),
        (2, lambda t: t.int(), "skips is torch.int32"),
        (2, lambda t: t[1:], r"skips is .* shape \[19\]"),
        (3, lambda t: t.bfloat16(), "down is torch.bfloat16"),
        (3, lambda t: t[:, :-1], "down has shape"),
        (3, lambda t: t[:0], "rank is 0, not 1 to 512"),
        (3, lambda t: t.repeat(40, 1), "rank is 640, not 1 to 512"),
        (4, lambda t: t.T, "up is"),
        (4, lambda t: t.T.contiguous().T, "contiguous rows"),
        (4, lambda t: t.half(), "up is torch.float16"),
    ],
)
def test_errors(index: int, wrong: Callable[[Any], Any], message: str) -> None:
    """Fails if a wrong tensor reaches the kernel, where it would be read out of bounds."""
    arguments = [*make(20, 64, 16, torch.float32), EPS]
    arguments[index] = wrong(arguments[index])
    with pytest.raises(KernelError, match=message):
        bypass_rows(*arguments)


@pytest.mark.parametrize("with_residual", [True, False])
def test_op(with_residual: bool) -> None:
    """Fails if the op changes its inputs, returns one of them, or differs from its fake in shape or dtype."""
    hidden, residual, skips, down, up = make(6, 64, 16, torch.bfloat16, 1.0)
    arguments = hidden, residual if with_residual else None, skips, down, up, EPS
    torch.library.opcheck(_bypass_rows, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(DEVICE != "cuda", reason="captures a CUDA graph")
def test_captured() -> None:
    """Fails if a replay repairs the rows that skipped at the capture."""
    hidden, residual, skips, down, up = make(64, 4096, 64, torch.bfloat16, 1.0)
    bypass_rows(hidden, residual, skips, down, up, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = bypass_rows(hidden, residual, skips, down, up, EPS)
    skips[::3] = False
    captured.fill_(float("nan"))
    graph.replay()
    assert captured[~skips].isnan().all()
    assert torch.equal(captured[skips], bypass_rows(hidden, residual, skips, down, up, EPS)[skips])
