"""Merges the rows that ran a layer with those that skipped it, adds the residual and applies the next RMSNorm.

    state[t]  = hidden_rows[source[t]] + residual_rows[source[t]], or hidden[t] + residual[t] where source[t] is -1
    normed[t] = RMSNorm(state[t]) * weight

Shapes: hidden_rows and residual_rows [num_rows, hidden_size]; source [num_tokens]; hidden, residual, normed and state
[num_tokens, hidden_size]; weight [hidden_size].

One program takes one token, reads one of the two pairs and keeps the row in registers: a row is read once and written
once or twice. Writing the rows back in place and then adding and normalising would move the rows that ran three times.
The grid does not depend on which tokens ran the layer, so a captured graph serves any division: only `source` differs.

Rounding is that of gather_rows.
"""

import torch

from vllm_buddy_kernels.gather_rows import (
    check_states,
    check_vector,
    load_state,
    norm_state,
    rms_norm_reference,
    row_launch,
)
from vllm_buddy_kernels.triton_import import KernelError, require_triton, tl, triton


@triton.jit(do_not_specialize=["p_source"])
def scatter_rows_kernel(  # type: ignore[no-untyped-def]
    p_hidden_rows,
    p_residual_rows,
    p_source,
    p_hidden,
    p_residual,  # or None
    p_weight,  # or None: no norm
    p_normed,
    p_state,
    eps,
    stride_hidden_rows,
    stride_residual_rows,
    stride_hidden,
    stride_residual,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_token = tl.program_id(0).to(tl.int64)
    i_row = tl.load(p_source + i_token).to(tl.int64)
    o_hidden = tl.arange(0, BLOCK)
    m_hidden = o_hidden < HIDDEN_SIZE
    if i_row >= 0:
        o_hidden_rows = i_row * stride_hidden_rows + o_hidden
        o_residual_rows = i_row * stride_residual_rows + o_hidden
        b_state = load_state(p_hidden_rows, p_residual_rows, o_hidden_rows, o_residual_rows, m_hidden)
    else:
        b_state = load_state(
            p_hidden, p_residual, i_token * stride_hidden + o_hidden, i_token * stride_residual + o_hidden, m_hidden
        )
    o_out = i_token * HIDDEN_SIZE + o_hidden
    tl.store(p_state + o_out, b_state, mask=m_hidden)
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_hidden, mask=m_hidden, other=0.0)
        tl.store(p_normed + o_out, norm_state(b_state, b_weight, eps, HIDDEN_SIZE), mask=m_hidden)


def scatter_rows_reference(
    hidden_rows: torch.Tensor,
    residual_rows: torch.Tensor,
    source: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Do the same in plain PyTorch."""
    state = hidden.clone() if residual is None else hidden + residual
    if len(hidden_rows) > 0:
        ran = (hidden_rows + residual_rows).index_select(0, source.clamp(min=0))
        state = torch.where(source[:, None] >= 0, ran, state)
    return None if weight is None else rms_norm_reference(state, weight, eps), state


def scatter_rows(
    hidden_rows: torch.Tensor,
    residual_rows: torch.Tensor,
    source: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return normed (None without a weight) and state of all tokens, each [num_tokens, hidden_size] in hidden's dtype.

    hidden_rows, residual_rows: [num_rows, hidden_size], float32, bfloat16 or float16, rows contiguous; may be empty.
    source: [num_tokens], int32, for each token its row in hidden_rows, or -1 if it skipped the layer; not checked
        against num_rows.
    hidden, residual: [num_tokens, hidden_size], read for tokens that skipped. Without residual, their state is hidden.
    weight: [hidden_size], hidden's dtype; None: no norm.

    Raises KernelError for other shapes, dtypes, strides and devices.
    """
    states = {"hidden": hidden, "residual": residual, "hidden_rows": hidden_rows, "residual_rows": residual_rows}
    check_states("scatter_rows", states)
    if residual is not None and residual.shape != hidden.shape:
        raise KernelError(f"scatter_rows: residual is {list(residual.shape)}, hidden {list(hidden.shape)}")
    if residual_rows.shape != hidden_rows.shape:
        raise KernelError(
            f"scatter_rows: residual_rows is {list(residual_rows.shape)}, hidden_rows {list(hidden_rows.shape)}"
        )
    check_vector("scatter_rows", "source", source, hidden, len(hidden), (torch.int32,))
    if weight is not None:
        check_vector("scatter_rows", "weight", weight, hidden, hidden.shape[1], (hidden.dtype,))
    normed, state = _scatter_rows(hidden_rows, residual_rows, source, hidden, residual, weight, eps)
    return None if weight is None else normed, state


@torch.library.custom_op("vllm_buddy::scatter_rows", mutates_args=())
def _scatter_rows(
    hidden_rows: torch.Tensor,
    residual_rows: torch.Tensor,
    source: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel. Without a weight, normed has no rows: an op cannot return None for a tensor."""
    require_triton(hidden.device)
    num_tokens, hidden_size = hidden.shape
    normed = hidden.new_empty(0 if weight is None else num_tokens, hidden_size)
    state = hidden.new_empty(num_tokens, hidden_size)
    if num_tokens > 0:
        scatter_rows_kernel[(num_tokens,)](
            hidden_rows,
            residual_rows,
            source,
            hidden,
            residual,
            weight,
            normed,
            state,
            eps,
            hidden_rows.stride(0),
            residual_rows.stride(0),
            hidden.stride(0),
            0 if residual is None else residual.stride(0),
            HIDDEN_SIZE=hidden_size,
            **row_launch(hidden_size),
        )
    return normed, state


@_scatter_rows.register_fake
def _(
    _hidden_rows: torch.Tensor,
    _residual_rows: torch.Tensor,
    _source: torch.Tensor,
    hidden: torch.Tensor,
    _residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    *_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, hidden_size = hidden.shape
    return hidden.new_empty(0 if weight is None else num_tokens, hidden_size), hidden.new_empty(num_tokens, hidden_size)
