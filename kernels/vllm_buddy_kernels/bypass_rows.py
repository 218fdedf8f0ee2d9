"""Low-rank repair of the rows that skip a layer, in one launch: residual add, norm, down, SiLU, up, add.

    s        = hidden[t] + residual[t]
    state[t] = s + up SiLU(down RMSNorm(s))

Shapes: hidden, residual and state [num_tokens, hidden_size]; down [rank, hidden_size]; up [hidden_size, rank].

In plain PyTorch this takes six or more launches on a few rows, and each launch takes longer to start than to run. Here
one program takes 16 rows, the height of a matrix instruction, and a slice of hidden_size. It computes the whole product
with `down` in one pass over its rows before they are normalised, and sums their squares on the way: the norm's factor
can be applied to the `rank` results instead. It then multiplies by its own slice of `up`. Every slice computes the
product with `down` again. That costs only reads from L2, and it spreads one block of rows over several SMs without a
barrier across the grid. A block of rows that all run the layer reads nothing but `skips`.

The order of the sums depends on hidden_size, rank and dtype alone, so a row's result does not depend on its neighbours.
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn

from vllm_buddy_kernels.gather_rows import check_states, check_vector, load_state
from vllm_buddy_kernels.triton_import import KernelError, interpreted, require_triton, tl, triton

BLOCK_ROWS = 16
MIN_SIDE = 16  # the smallest side of a matrix instruction
MAX_RANK = 512  # with a larger rank the tiles do not fit into shared memory
MAX_SLICES = 32
TARGET_PROGRAMS = 128  # an H100 has 132 SMs
NUM_STAGES = 3
STAGES_BYTES = 144 * 1024  # of the shared memory that an H100 gives a program
H100_SHARED_BYTES = 227 * 1024


@dataclass(frozen=True)
class BypassLaunch:
    """Tile sizes. columns: how many columns of the output one program computes, a multiple of block_out."""

    block_rank: int
    block_in: int
    block_out: int
    columns: int
    num_warps: int


def bypass_launch(
    num_tokens: int, hidden_size: int, rank: int, itemsize: int, shared_bytes: int = H100_SHARED_BYTES
) -> BypassLaunch:
    """Return the launch for sizes that the host knows. Only the number of slices depends on num_tokens.

    shared_bytes: shared memory that the device gives a program; an H100's share of it goes to the stages, and no more.
    """
    block_rank = max(MIN_SIDE, _power_of_2_up(rank))
    # There are no matrix instructions in full fp32, so every thread keeps its share of a chunk in registers.
    most = 32 if itemsize == 4 else 256
    stages_bytes = STAGES_BYTES * min(shared_bytes, H100_SHARED_BYTES) // H100_SHARED_BYTES
    fitting = stages_bytes // (NUM_STAGES * itemsize * (block_rank + 2 * BLOCK_ROWS))
    block_in = max(MIN_SIDE, min(most, _power_of_2_down(fitting), _power_of_2_up(hidden_size)))
    block_out = min(64, max(MIN_SIDE, 8192 // block_rank))
    row_blocks = -(-num_tokens // BLOCK_ROWS)
    slices = min(MAX_SLICES, max(1, TARGET_PROGRAMS // max(1, row_blocks)))
    columns = -(-hidden_size // (slices * block_out)) * block_out
    return BypassLaunch(block_rank, block_in, block_out, columns, 4 if block_rank <= 64 else 8)


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that Triton gives a program on a device, in bytes; in the interpreter, as on an H100."""
    if interpreted():
        return H100_SHARED_BYTES
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


def _power_of_2_up(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _power_of_2_down(n: int) -> int:
    return 1 << (n.bit_length() - 1)


@triton.jit(do_not_specialize=["p_skips", "num_tokens"])
def bypass_rows_kernel(  # type: ignore[no-untyped-def]
    p_hidden,
    p_residual,  # or None
    p_skips,
    p_down,
    p_up,
    p_state,
    eps,
    num_tokens,
    columns,
    stride_hidden,
    stride_residual,
    stride_down,
    stride_up,
    HIDDEN_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    WIDEN: tl.constexpr,  # Triton's interpreter stores bfloat16 as integers and would multiply those
):
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_row = tl.load(p_skips + i_row, mask=i_row < num_tokens, other=0) != 0
    if tl.max(m_row.to(tl.int32), axis=0) == 0:
        return
    o_row = i_row[:, None] * stride_hidden
    o_residual_row = i_row[:, None] * stride_residual
    i_rank = tl.arange(0, BLOCK_RANK)
    m_rank = i_rank < RANK

    b_product = tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float32)
    b_squares = tl.zeros([BLOCK_ROWS, BLOCK_IN], tl.float32)
    for start in range(0, HIDDEN_SIZE, BLOCK_IN):
        i_in = start + tl.arange(0, BLOCK_IN)
        m_in = i_in < HIDDEN_SIZE
        m_tile = m_row[:, None] & m_in[None, :]
        b_state = load_state(p_hidden, p_residual, o_row + i_in[None, :], o_residual_row + i_in[None, :], m_tile)
        b_down = tl.load(
            p_down + i_rank[None, :] * stride_down + i_in[:, None], mask=m_in[:, None] & m_rank[None, :], other=0.0
        )
        b_float = b_state.to(tl.float32)
        if WIDEN:
            b_state = b_float
            b_down = b_down.to(tl.float32)
        b_product = tl.dot(b_state, b_down, b_product, input_precision="ieee")
        b_squares += b_float * b_float
    b_scale = tl.rsqrt(tl.sum(b_squares, axis=1) / HIDDEN_SIZE + eps)
    b_inner = b_product * b_scale[:, None]
    b_inner = (b_inner * tl.sigmoid(b_inner)).to(p_up.dtype.element_ty)
    if WIDEN:
        b_inner = b_inner.to(tl.float32)

    first = tl.program_id(1).to(tl.int64) * columns
    for start in range(first, tl.minimum(first + columns, HIDDEN_SIZE), BLOCK_OUT):
        i_out = start + tl.arange(0, BLOCK_OUT)
        m_out = i_out < HIDDEN_SIZE
        m_tile = m_row[:, None] & m_out[None, :]
        b_state = load_state(p_hidden, p_residual, o_row + i_out[None, :], o_residual_row + i_out[None, :], m_tile)
        b_up = tl.load(
            p_up + i_out[None, :] * stride_up + i_rank[:, None], mask=m_rank[:, None] & m_out[None, :], other=0.0
        )
        if WIDEN:
            b_up = b_up.to(tl.float32)
        b_delta = tl.dot(b_inner, b_up, input_precision="ieee").to(b_state.dtype)
        b_state = b_state.to(tl.float32) + b_delta.to(tl.float32)
        p_out = p_state + i_row[:, None] * HIDDEN_SIZE + i_out[None, :]
        tl.store(p_out, b_state.to(p_state.dtype.element_ty), mask=m_tile)


def bypass_rows_reference(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    skips: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Do the same in plain PyTorch, with every step rounded to the dtype. Counts the rows on the host."""
    rows = skips.nonzero().squeeze(1)
    before = hidden.index_select(0, rows)
    if residual is not None:
        before += residual.index_select(0, rows)
    normed = nn.functional.rms_norm(before, before.shape[-1:], eps=eps)
    inner = nn.functional.silu(nn.functional.linear(normed, down))
    return hidden.new_empty(hidden.shape).index_copy_(0, rows, before + nn.functional.linear(inner, up))


def bypass_rows(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    skips: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Return the state after a skipped layer, [num_tokens, hidden_size] in hidden's dtype.

    Rows that run the layer are undefined.

    hidden, residual: [num_tokens, hidden_size], float32, bfloat16 or float16, rows contiguous. Without a residual, the
        state before the layer is hidden.
    skips: [num_tokens], bool, True where the row skips the layer.
    down: [rank, hidden_size]; up: [hidden_size, rank]; hidden's dtype, rows contiguous, rank 1 to 512.

    Raises KernelError for other shapes, dtypes, strides and devices.
    """
    check_states("bypass_rows", {"hidden": hidden, "residual": residual, "down": down})
    if residual is not None and residual.shape != hidden.shape:
        raise KernelError(f"bypass_rows: residual is {list(residual.shape)}, hidden {list(hidden.shape)}")
    check_vector("bypass_rows", "skips", skips, hidden, len(hidden), (torch.bool,))
    rank, hidden_size = down.shape
    if not 1 <= rank <= MAX_RANK:
        raise KernelError(f"bypass_rows: the rank is {rank}, not 1 to {MAX_RANK}")
    if up.shape != (hidden_size, rank) or up.dtype != down.dtype or up.device != down.device or up.stride(1) != 1:
        raise KernelError(
            f"bypass_rows: up is {up.dtype} of shape {list(up.shape)} with strides {list(up.stride())} on {up.device}; "
            f"{down.dtype} of shape {[hidden_size, rank]} with contiguous rows on {down.device} is wanted"
        )
    return _bypass_rows(hidden, residual, skips, down, up, eps)


@torch.library.custom_op("vllm_buddy::bypass_rows", mutates_args=())
def _bypass_rows(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    skips: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    require_triton(hidden.device)
    num_tokens, hidden_size = hidden.shape
    state = hidden.new_empty(num_tokens, hidden_size)
    if num_tokens > 0:
        launch = bypass_launch(num_tokens, hidden_size, len(down), hidden.itemsize, shared_bytes(hidden.device))
        bypass_rows_kernel[(-(-num_tokens // BLOCK_ROWS), -(-hidden_size // launch.columns))](
            hidden,
            residual,
            skips.view(torch.uint8),
            down,
            up,
            state,
            eps,
            num_tokens,
            launch.columns,
            hidden.stride(0),
            0 if residual is None else residual.stride(0),
            down.stride(0),
            up.stride(0),
            HIDDEN_SIZE=hidden_size,
            RANK=len(down),
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_RANK=launch.block_rank,
            BLOCK_IN=launch.block_in,
            BLOCK_OUT=launch.block_out,
            WIDEN=interpreted(),
            num_warps=launch.num_warps,
            num_stages=NUM_STAGES,
        )
    return state


@_bypass_rows.register_fake
def _(hidden: torch.Tensor, *_: object) -> torch.Tensor:
    return hidden.new_empty(hidden.shape)
