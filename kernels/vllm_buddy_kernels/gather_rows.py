"""Gathers the rows that run a layer, adds the residual and applies the layer's first RMSNorm, in one pass.

    state[i]  = hidden[rows[i]] + residual[rows[i]]
    normed[i] = RMSNorm(state[i]) * weight

Shapes: hidden and residual [num_tokens, hidden_size]; rows [num_rows]; normed and state [num_rows, hidden_size].

One program takes one row and keeps it in registers: a row is read once and written twice. Gathering hidden and residual
first and then adding and normalising, as vLLM does, takes three launches, one more write and two more reads.

Rounding follows vLLM's CUDA kernels: the sum is rounded to the dtype; the norm of the rounded sum is computed in fp32
and rounded; the product with the weight is rounded again. vLLM's native form has the same order but computes the norm
from the sum before it is rounded.
"""

from collections.abc import Mapping

import torch

from vllm_buddy_kernels.triton_import import KernelError, require_triton, tl, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ELEMENTS_PER_WARP = 512  # two loads of 16 bytes per thread in 16 bits
MIN_WARPS, MAX_WARPS = 4, 16


def row_launch(hidden_size: int) -> dict[str, int]:
    """Return the launch options of a kernel in which each program keeps one row."""
    block = triton.next_power_of_2(hidden_size)
    return {"BLOCK": block, "num_warps": min(MAX_WARPS, max(MIN_WARPS, block // ELEMENTS_PER_WARP))}


@triton.jit
def load_state(p_hidden, p_residual, o_hidden, o_residual, mask):  # type: ignore[no-untyped-def]
    """Return hidden + residual, rounded to their dtype, or hidden if residual is None."""
    b_state = tl.load(p_hidden + o_hidden, mask=mask, other=0.0)
    if p_residual is not None:
        b_residual = tl.load(p_residual + o_residual, mask=mask, other=0.0)
        b_state = (b_state.to(tl.float32) + b_residual.to(tl.float32)).to(b_state.dtype)
    return b_state


@triton.jit
def norm_state(b_state, b_weight, eps, HIDDEN_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the RMSNorm of one row, times the weight."""
    b_float = b_state.to(tl.float32)
    scale = tl.rsqrt(tl.sum(b_float * b_float, axis=0) / HIDDEN_SIZE + eps)
    b_normed = (b_float * scale).to(b_weight.dtype)
    return (b_normed.to(tl.float32) * b_weight.to(tl.float32)).to(b_weight.dtype)


@triton.jit(do_not_specialize=["p_rows"])
def gather_rows_kernel(  # type: ignore[no-untyped-def]
    p_hidden,
    p_residual,  # or None
    p_rows,
    p_weight,
    p_normed,
    p_state,
    eps,
    stride_hidden,
    stride_residual,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_out = tl.program_id(0).to(tl.int64)
    i_row = tl.load(p_rows + i_out).to(tl.int64)
    o_hidden = tl.arange(0, BLOCK)
    m_hidden = o_hidden < HIDDEN_SIZE
    b_weight = tl.load(p_weight + o_hidden, mask=m_hidden, other=0.0)
    b_state = load_state(
        p_hidden, p_residual, i_row * stride_hidden + o_hidden, i_row * stride_residual + o_hidden, m_hidden
    )
    o_out = i_out * HIDDEN_SIZE + o_hidden
    tl.store(p_state + o_out, b_state, mask=m_hidden)
    tl.store(p_normed + o_out, norm_state(b_state, b_weight, eps, HIDDEN_SIZE), mask=m_hidden)


def rms_norm_reference(state: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the RMSNorm of rows, times the weight, rounded as vLLM rounds. state: [num_rows, hidden_size]."""
    wide = state.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(state.dtype) * weight


def gather_rows_reference(
    hidden: torch.Tensor, residual: torch.Tensor | None, rows: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do the same in plain PyTorch."""
    state = hidden.index_select(0, rows)
    if residual is not None:
        state += residual.index_select(0, rows)
    return rms_norm_reference(state, weight, eps), state


def check_states(op: str, states: Mapping[str, torch.Tensor | None]) -> None:
    """Raise KernelError unless all states are [*, hidden_size] of one dtype, on one device. None is ignored."""
    given = {name: state for name, state in states.items() if state is not None}
    model, like = next(iter(given.items()))
    for name, state in given.items():
        if state.dtype not in DTYPES or state.dtype != like.dtype or state.device != like.device:
            raise KernelError(
                f"{op}: {name} is {state.dtype} on {state.device} and {model} {like.dtype} on {like.device}; "
                f"one device is wanted, and one dtype of {', '.join(map(str, DTYPES))}"
            )
        if state.dim() != 2 or state.shape[1] != like.shape[1] or state.stride(1) != 1:
            raise KernelError(
                f"{op}: {name} has shape {list(state.shape)} and strides {list(state.stride())}; "
                f"[*, {like.shape[-1]}] with contiguous rows is wanted"
            )


def check_vector(
    op: str, name: str, vector: torch.Tensor, like: torch.Tensor, length: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise KernelError unless the vector is contiguous, has this length and one of these dtypes, on like's device."""
    if (
        vector.shape != (length,)
        or vector.dtype not in dtypes
        or vector.device != like.device
        or not vector.is_contiguous()
    ):
        raise KernelError(
            f"{op}: {name} is {vector.dtype} of shape {list(vector.shape)} with strides {list(vector.stride())} on "
            f"{vector.device}; contiguous [{length}] of {' or '.join(map(str, dtypes))} on {like.device} is wanted"
        )


def gather_rows(
    hidden: torch.Tensor, residual: torch.Tensor | None, rows: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normed and state of `rows`, each [num_rows, hidden_size] in hidden's dtype.

    hidden, residual: [num_tokens, hidden_size], float32, bfloat16 or float16, rows contiguous. Without a residual, the
        state is hidden.
    rows: [num_rows], int32 or int64, not checked against num_tokens.
    weight: [hidden_size], hidden's dtype.

    Raises KernelError for other shapes, dtypes, strides and devices.
    """
    check_states("gather_rows", {"hidden": hidden, "residual": residual})
    if residual is not None and residual.shape != hidden.shape:
        raise KernelError(f"gather_rows: residual is {list(residual.shape)}, hidden {list(hidden.shape)}")
    check_vector("gather_rows", "rows", rows, hidden, rows.numel(), (torch.int32, torch.int64))
    check_vector("gather_rows", "weight", weight, hidden, hidden.shape[1], (hidden.dtype,))
    return _gather_rows(hidden, residual, rows, weight, eps)


@torch.library.custom_op("vllm_buddy::gather_rows", mutates_args=())
def _gather_rows(
    hidden: torch.Tensor, residual: torch.Tensor | None, rows: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    require_triton(hidden.device)
    num_rows, hidden_size = len(rows), hidden.shape[1]
    normed, state = hidden.new_empty(num_rows, hidden_size), hidden.new_empty(num_rows, hidden_size)
    if num_rows > 0:
        gather_rows_kernel[(num_rows,)](
            hidden,
            residual,
            rows,
            weight,
            normed,
            state,
            eps,
            hidden.stride(0),
            0 if residual is None else residual.stride(0),
            HIDDEN_SIZE=hidden_size,
            **row_launch(hidden_size),
        )
    return normed, state


@_gather_rows.register_fake
def _(
    hidden: torch.Tensor,
    _residual: torch.Tensor | None,
    rows: torch.Tensor,
    *_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = len(rows), hidden.shape[1]
    return hidden.new_empty(shape), hidden.new_empty(shape)
