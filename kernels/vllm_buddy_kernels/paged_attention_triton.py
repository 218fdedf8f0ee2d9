"""The Triton side of paged_attention: attention over one split of a sequence, and the join of the splits.

Shapes, and why it is built like this: paged_attention.py.
"""

from vllm_buddy_kernels.triton_import import tl, triton


@triton.jit
def _valid_slots(  # type: ignore[no-untyped-def]
    p_block_table, p_slot_paths, i_token, end, layer, BLOCK_SIZE: tl.constexpr
):
    """Slots of these tokens, int32; -1 for those at `end` or after, or that did not run the layer."""
    m_token = i_token < end
    i_block = tl.load(p_block_table + i_token // BLOCK_SIZE, mask=m_token, other=0)
    i_slot = i_block * BLOCK_SIZE + i_token % BLOCK_SIZE
    b_paths = tl.load(p_slot_paths + i_slot, mask=m_token, other=0)
    return tl.where(((b_paths >> layer) & 1) != 0, i_slot, -1)


@triton.jit(do_not_specialize=["layer"])
def attend_kernel(  # type: ignore[no-untyped-def]
    p_query,
    p_key,
    p_value,
    p_block_table,
    p_seq_lens,
    p_slot_paths,
    p_out,  # of a split: its part, [num_seqs, num_heads, NUM_SPLITS, HEAD_SIZE]
    p_lse,  # [num_seqs, num_heads, NUM_SPLITS], log2; unused if there is one split
    layer,
    scale_log2,
    stride_query_seq,
    stride_query_head,
    stride_key_block,
    stride_key_token,
    stride_key_head,
    stride_value_block,
    stride_value_token,
    stride_value_head,
    stride_table,
    stride_out_seq,
    stride_out_head,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    WIDEN: tl.constexpr,  # for Triton's interpreter, which holds bfloat16 as integers, and would multiply those
):
    i_kv_head = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1)
    i_seq = tl.program_id(2).to(tl.int64)
    i_group = tl.arange(0, PADDED_GROUP)
    i_dim = tl.arange(0, PADDED_HEAD)
    i_tile = tl.arange(0, TILE)
    m_head = i_group < GROUP
    m_dim = i_dim < HEAD_SIZE
    m_out = m_head[:, None] & m_dim[None, :]
    i_head = i_kv_head * GROUP + i_group

    p_query += i_seq * stride_query_seq
    b_query = tl.load(p_query + i_head[:, None] * stride_query_head + i_dim[None, :], mask=m_out, other=0.0)
    if WIDEN:
        b_query = b_query.to(tl.float32)
    p_key += i_kv_head * stride_key_head
    p_value += i_kv_head * stride_value_head
    p_block_table += i_seq * stride_table

    seq_len = tl.load(p_seq_lens + i_seq)
    num_blocks = tl.cdiv(seq_len, BLOCK_SIZE)
    first = num_blocks * i_split // NUM_SPLITS * BLOCK_SIZE
    end = tl.minimum(num_blocks * (i_split + 1) // NUM_SPLITS * BLOCK_SIZE, seq_len)

    b_max = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    b_sum = tl.zeros([PADDED_GROUP], tl.float32)
    b_acc = tl.zeros([PADDED_GROUP, PADDED_HEAD], tl.float32)
    i_slot = _valid_slots(p_block_table, p_slot_paths, first + i_tile, end, layer, BLOCK_SIZE)
    for start in range(first, end, TILE):
        i_next_slot = _valid_slots(p_block_table, p_slot_paths, start + TILE + i_tile, end, layer, BLOCK_SIZE)
        if tl.max(i_slot, axis=0) >= 0:
            m_valid = i_slot >= 0
            m_tile = m_valid[:, None] & m_dim[None, :]
            i_block = (i_slot // BLOCK_SIZE).to(tl.int64)
            i_offset = i_slot % BLOCK_SIZE
            o_key = i_block * stride_key_block + i_offset * stride_key_token
            o_value = i_block * stride_value_block + i_offset * stride_value_token
            # Both loads come before the first product: nothing else keeps the memory busy meanwhile.
            b_key = tl.load(p_key + o_key[:, None] + i_dim[None, :], mask=m_tile, other=0.0)
            b_value = tl.load(p_value + o_value[:, None] + i_dim[None, :], mask=m_tile, other=0.0)
            if WIDEN:
                b_key = b_key.to(tl.float32)
            b_scores = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale_log2
            b_scores = tl.where(m_valid[None, :], b_scores, float("-inf"))
            # Finite, since the tile has a valid token.
            b_new_max = tl.maximum(b_max, tl.max(b_scores, axis=1))
            b_rescale = tl.exp2(b_max - b_new_max)
            b_weights = tl.exp2(b_scores - b_new_max[:, None])
            b_sum = b_sum * b_rescale + tl.sum(b_weights, axis=1)
            b_weights = b_weights.to(b_value.dtype)
            if WIDEN:
                b_weights = b_weights.to(tl.float32)
                b_value = b_value.to(tl.float32)
            b_acc = b_acc * b_rescale[:, None]
            b_acc += tl.dot(b_weights, b_value, input_precision="ieee")
            b_max = b_new_max
        i_slot = i_next_slot

    m_any = b_sum > 0
    b_acc = b_acc / tl.where(m_any, b_sum, 1.0)[:, None]
    p_out += i_seq * stride_out_seq + i_split * HEAD_SIZE
    tl.store(p_out + i_head[:, None] * stride_out_head + i_dim[None, :], b_acc.to(p_out.dtype.element_ty), mask=m_out)
    if NUM_SPLITS > 1:
        p_lse += (i_seq * tl.num_programs(0) * GROUP + i_head) * NUM_SPLITS + i_split
        tl.store(p_lse, tl.where(m_any, b_max + tl.log2(tl.where(m_any, b_sum, 1.0)), float("-inf")), mask=m_head)


@triton.jit
def combine_kernel(  # type: ignore[no-untyped-def]
    p_parts,
    p_lse,
    p_out,
    stride_out_seq,
    stride_out_head,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    i_head = tl.program_id(0).to(tl.int64)
    i_seq = tl.program_id(1).to(tl.int64)
    i_split = tl.arange(0, NUM_SPLITS)
    i_dim = tl.arange(0, PADDED_HEAD)
    o_part = (i_seq * tl.num_programs(0) + i_head) * NUM_SPLITS + i_split
    b_lse = tl.load(p_lse + o_part)
    b_max = tl.max(b_lse, axis=0)
    # Where no split has a valid token every lse is -inf, and -inf - -inf would be NaN.
    b_share = tl.exp2(b_lse - tl.where(b_max == float("-inf"), 0.0, b_max))
    b_total = tl.sum(b_share, axis=0)
    m_dim = i_dim < HEAD_SIZE
    m_parts = (b_share > 0)[:, None] & m_dim[None, :]
    b_parts = tl.load(p_parts + o_part[:, None] * HEAD_SIZE + i_dim[None, :], mask=m_parts, other=0.0)
    b_out = tl.sum(b_parts * b_share[:, None], axis=0) / tl.where(b_total > 0, b_total, 1.0)
    p_out += i_seq * stride_out_seq + i_head * stride_out_head
    tl.store(p_out + i_dim, b_out.to(p_out.dtype.element_ty), mask=m_dim)
