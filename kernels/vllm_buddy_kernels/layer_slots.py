"""Computes the KV-cache slots and lengths of every layer from the plan of a step, in one launch.

A *run* is a sequence of consecutive tokens of one request on one path. A *view* is what one layer, or several layers
with equal views, sees of the cache: a request holds only the tokens that ran the layer, contiguous in its block table.

    slots[v, t]   = block_table[request, first_block + p // block_size] * block_size + p % block_size
                    with p = first_position[v, run] + (t - run_start[run]); -1 where the run skips the layer
    lengths[v, r] = first_position[v, r] + length of run r; idle_length where the run skips the layer

Shapes: first_position [num_views, num_runs]; slots [num_views, num_token_columns]; lengths [num_views,
num_run_columns].

On the host, a slot would have to be computed and copied for each token of each layer. The kernel reads one number per
run and view and writes each slot once. One program takes BLOCK columns of one view. The kernel reads the number of
tokens on the device and also fills the columns after them, so a captured graph serves smaller steps. Pad such a step
with runs of no tokens that skip every layer.
"""

import torch

from vllm_buddy_kernels.triton_import import KernelError, require_triton, tl, triton

# Columns of a program: the first that is as wide as what is to be written, else the last.
LAUNCH_BLOCKS = (128, 256, 512, 1024)
NUM_WARPS = 4


# Specialisation would compile the kernel again for numbers that change between steps, and for pointers into one packed
# transfer, whose alignment changes.
@triton.jit(
    do_not_specialize=[
        "p_token_run",
        "p_run_request",
        "p_run_start",
        "p_first_position",
        "p_first_block",
        "num_runs",
        "num_token_columns",
        "num_run_columns",
        "idle_length",
        "stride_table",
        "stride_position_view",
        "stride_position_run",
        "stride_block_view",
        "stride_block_run",
        "stride_slots",
        "stride_lengths",
    ]
)
def layer_slots_kernel(  # type: ignore[no-untyped-def]
    p_block_table,
    p_token_run,
    p_run_request,
    p_run_start,
    p_first_position,
    p_first_block,  # None: 0 everywhere
    p_slots,
    p_lengths,
    num_runs,
    num_token_columns,
    num_run_columns,
    idle_length,
    stride_table,
    stride_position_view,
    stride_position_run,
    stride_block_view,
    stride_block_run,
    stride_slots,
    stride_lengths,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_view = tl.program_id(1).to(tl.int64)
    o_column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    p_first_position += i_view * stride_position_view

    num_tokens = tl.load(p_run_start + num_runs)
    m_token = (o_column < num_tokens) & (o_column < num_token_columns)
    i_run = tl.load(p_token_run + o_column, mask=m_token, other=0).to(tl.int64)
    b_start = tl.load(p_run_start + i_run, mask=m_token, other=0)
    b_first = tl.load(p_first_position + i_run * stride_position_run, mask=m_token, other=-1)
    m_runs = m_token & (b_first >= 0)
    i_request = tl.load(p_run_request + i_run, mask=m_runs, other=0).to(tl.int64)
    b_position = b_first + o_column - b_start
    i_entry = b_position // BLOCK_SIZE
    if p_first_block is not None:
        i_entry += tl.load(p_first_block + i_view * stride_block_view + i_run * stride_block_run, mask=m_runs, other=0)
    i_block = tl.load(p_block_table + i_request * stride_table + i_entry, mask=m_runs, other=0).to(tl.int64)
    b_slot = tl.where(m_runs, i_block * BLOCK_SIZE + b_position % BLOCK_SIZE, -1)
    tl.store(p_slots + i_view * stride_slots + o_column, b_slot, mask=o_column < num_token_columns)

    m_run = (o_column < num_runs) & (o_column < num_run_columns)
    b_first = tl.load(p_first_position + o_column * stride_position_run, mask=m_run, other=-1)
    b_start = tl.load(p_run_start + o_column, mask=m_run, other=0)
    b_end = tl.load(p_run_start + o_column + 1, mask=m_run, other=0)
    b_length = tl.where(b_first >= 0, b_first + b_end - b_start, idle_length)
    tl.store(p_lengths + i_view * stride_lengths + o_column, b_length, mask=o_column < num_run_columns)


def layer_slots_reference(
    block_table: torch.Tensor,
    token_run: torch.Tensor,
    run_request: torch.Tensor,
    run_start: torch.Tensor,
    first_position: torch.Tensor,
    first_block: torch.Tensor | None,
    block_size: int,
    idle_length: int,
    slots: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Do the same in plain PyTorch. Reads the number of tokens on the host."""
    num_tokens = min(int(run_start[-1]), slots.shape[1])
    num_runs = min(len(run_request), lengths.shape[1])
    run = token_run[:num_tokens]
    first = first_position.index_select(1, run)
    position = first + (torch.arange(num_tokens, device=run.device) - run_start.index_select(0, run))
    entry = position // block_size
    if first_block is not None:
        entry = entry + first_block.index_select(1, run)
    block = block_table[run_request.index_select(0, run), entry.clamp_(min=0)].long()
    slots[:, :num_tokens] = (block * block_size + position % block_size).masked_fill_(first < 0, -1)
    slots[:, num_tokens:] = -1
    first = first_position[:, :num_runs]
    lengths[:, :num_runs] = (first + run_start.diff()[:num_runs]).masked_fill_(first < 0, idle_length)
    lengths[:, num_runs:] = idle_length


def layer_slots(
    block_table: torch.Tensor,
    token_run: torch.Tensor,
    run_request: torch.Tensor,
    run_start: torch.Tensor,
    first_position: torch.Tensor,
    first_block: torch.Tensor | None,
    block_size: int,
    idle_length: int,
    slots: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Write the slots and lengths of all views.

    The plan's values are not checked, because that would have to wait for the device.

    block_table: [num_reqs, max_num_blocks], int32.
    token_run: [at least num_tokens], int32, the run of each token; entries after the tokens are not read.
    run_request: [num_runs], int32, the run's row of the block table.
    run_start: [num_runs + 1], int32, first token of each run; the last entry is num_tokens.
    first_position: [num_views, num_runs], int32, position of each run's first token in the view, or -1 if it skips it.
    first_block: the same shape, int32, entry of the block-table row at which the view starts; None: 0 everywhere.
    block_size: tokens per KV block. idle_length: the length written where a run skips the layer.
    slots: [num_views, num_token_columns], int64, written; -1 after the tokens.
    lengths: [num_views, num_run_columns], int32, written; idle_length after the runs.

    Raises KernelError for shapes, dtypes, strides and devices other than these.
    """
    tensors = {
        "block_table": (block_table, torch.int32, 2),
        "token_run": (token_run, torch.int32, 1),
        "run_request": (run_request, torch.int32, 1),
        "run_start": (run_start, torch.int32, 1),
        "first_position": (first_position, torch.int32, 2),
        "first_block": (first_block, torch.int32, 2),
        "slots": (slots, torch.int64, 2),
        "lengths": (lengths, torch.int32, 2),
    }
    strided = ("first_position", "first_block")
    for name, (tensor, dtype, dim) in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.dim() != dim or tensor.device != slots.device:
            raise KernelError(
                f"layer_slots: {name} is {tensor.dim()}-d {tensor.dtype} on {tensor.device}; "
                f"{dim}-d {dtype} on {slots.device} is wanted"
            )
        if name not in strided and tensor.stride(-1) != 1:
            raise KernelError(f"layer_slots: {name} has stride {tensor.stride(-1)} in its last dimension, not 1")
    num_views, num_runs = len(slots), len(run_request)
    shapes = {"first_position": first_position, "first_block": first_block}
    for name, places in shapes.items():
        if places is not None and places.shape != (num_views, num_runs):
            raise KernelError(
                f"layer_slots: {name} is {list(places.shape)}; [num_views, num_runs] is [{num_views}, {num_runs}]"
            )
    if len(run_start) != num_runs + 1 or len(lengths) != num_views:
        raise KernelError(
            f"layer_slots: run_start has {len(run_start)} entries and lengths {len(lengths)} rows; "
            f"num_runs + 1 is {num_runs + 1} and num_views {num_views}"
        )
    if block_size < 1:
        raise KernelError(f"layer_slots: block_size is {block_size}, not at least 1")
    _layer_slots(
        block_table,
        token_run,
        run_request,
        run_start,
        first_position,
        first_block,
        block_size,
        idle_length,
        slots,
        lengths,
    )


@torch.library.custom_op("vllm_buddy::layer_slots", mutates_args=("slots", "lengths"))
def _layer_slots(
    block_table: torch.Tensor,
    token_run: torch.Tensor,
    run_request: torch.Tensor,
    run_start: torch.Tensor,
    first_position: torch.Tensor,
    first_block: torch.Tensor | None,
    block_size: int,
    idle_length: int,
    slots: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    require_triton(slots.device)
    width = max(slots.shape[1], lengths.shape[1])
    if len(slots) == 0 or width == 0:
        return
    block = next((block for block in LAUNCH_BLOCKS if block >= width), LAUNCH_BLOCKS[-1])
    block_strides = (0, 0) if first_block is None else first_block.stride()
    layer_slots_kernel[(triton.cdiv(width, block), len(slots))](
        block_table,
        token_run,
        run_request,
        run_start,
        first_position,
        first_block,
        slots,
        lengths,
        len(run_request),
        slots.shape[1],
        lengths.shape[1],
        idle_length,
        block_table.stride(0),
        *first_position.stride(),
        *block_strides,
        slots.stride(0),
        lengths.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=block,
        num_warps=NUM_WARPS,
    )


@_layer_slots.register_fake
def _(*_: object) -> None:
    return None
