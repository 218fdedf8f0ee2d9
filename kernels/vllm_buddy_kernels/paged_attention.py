"""Decode attention over a KV cache with a validity bit per token and layer.

Serving packs the cache today: in each layer a request holds only the tokens that ran the layer. What a block contains
then depends on the paths of its tokens, and requests whose paths change cannot share it. Here a token has the same slot
in every layer, as in stock vLLM, and a word per slot says which layers it ran. The words follow the physical slot, so
the prefix cache can share blocks of requests on any paths. Serving does not use it yet.

    query      [num_seqs, num_heads, head_size]: one token per sequence
    caches     [num_blocks, block_size, num_kv_heads, head_size], any strides: vLLM's FlashAttention layout is
               kv_cache.transpose(1, 2).split(head_size, -1) of [num_blocks, num_kv_heads, block_size, 2 * head_size]
    slot_paths [num_blocks * block_size], int64: bit l is set if the token in the slot ran layer l

One program serves all query heads of a KV head, so that K and V are read once; the group is padded to the 16 rows that
a matrix instruction has. It reads the words of a tile first, 8 bytes a token against the 4 * head_size of K and V in 16
bits, and passes over a tile in which nobody ran the layer; elsewhere only rows of valid tokens are read. The words of
the next tile are loaded while this one is computed. A few sequences do not fill a GPU: each is split over several
programs, and a second kernel joins their parts.
"""

import math

import torch

from vllm_buddy_kernels.paged_attention_triton import attend_kernel, combine_kernel
from vllm_buddy_kernels.triton_import import KernelError, interpreted, require_triton, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_LAYER = 62  # Bit 63 is the sign of the word.
MAX_HEAD_SIZE = 256
MIN_BLOCK_SIZE = 16
MIN_PADDED = 16  # the least a side of a matrix instruction has

# Registers let an H100 hold three or four programs on each of its 132 SMs. About twice as many in all, so that
# sequences of unequal length even out.
TARGET_PROGRAMS = 1024
MIN_SPLIT_TOKENS = 256
MAX_SPLITS = 64
TILE_BYTES = 16384  # of K, and as much of V: what a program has under way at once
NUM_WARPS = 4


def split_count(num_seqs: int, num_kv_heads: int, max_tokens: int) -> int:
    """Programs per sequence and KV head, a power of two: of sizes the host knows, so that a captured graph is valid."""
    wanted = min(TARGET_PROGRAMS // max(1, num_seqs * num_kv_heads), max_tokens // MIN_SPLIT_TOKENS, MAX_SPLITS)
    return 1 << (max(1, wanted).bit_length() - 1)


def tile_tokens(padded_head_size: int, itemsize: int) -> int:
    """Tokens whose K and V one program handles at once."""
    return min(128, max(16, TILE_BYTES // (padded_head_size * itemsize)))


def paged_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_paths: torch.Tensor,
    layer: int,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain PyTorch, over the whole width of the block table."""
    num_seqs, num_heads, head_size = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    i_token = torch.arange(block_table.shape[1] * block_size, device=query.device)
    m_token = i_token < seq_lens[:, None]
    i_block = block_table.long().repeat_interleave(block_size, 1).masked_fill(~m_token, 0)
    i_offset = (i_token % block_size).expand_as(i_block)
    m_valid = m_token & ((slot_paths[i_block * block_size + i_offset] >> layer) & 1).bool()
    keys, values = (
        cache[i_block, i_offset].masked_fill(~m_valid[:, :, None, None], 0).float()
        for cache in (key_cache, value_cache)
    )
    grouped = query.float().view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_size)
    scores = torch.einsum("skgd,stkd->skgt", grouped, keys) * scale
    weights = scores.masked_fill(~m_valid[:, None, None, :], -math.inf).softmax(-1)
    weights = weights.masked_fill(~m_valid.any(1)[:, None, None, None], 0)
    result = torch.einsum("skgt,stkd->skgd", weights, values).reshape(query.shape).to(query.dtype)
    return result if out is None else out.copy_(result)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_paths: torch.Tensor,
    layer: int,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query per sequence over the positions before its length whose slots ran `layer`.

    query, out: [num_seqs, num_heads, head_size]; float32, bfloat16 or float16, as are the caches (module docstring).
    block_table: [num_seqs, max_num_blocks], int32; entries past a sequence's blocks may be anything.
    seq_lens: [num_seqs], int32, the present token included.
    A sequence without a valid position, also one of length 0, gets zeros. RoPE is in K already. How many parts a
    sequence is split into depends on the batch and the width of the block table, and so do the last bits of the result.

    Raises:
        KernelError: shapes, dtypes or strides that the kernel does not take; no Triton, or no device for it.
    """
    out = torch.empty_like(query) if out is None else out
    _check(query, key_cache, value_cache, block_table, seq_lens, slot_paths, layer, out)
    require_triton(query.device)
    _paged_attention(query, key_cache, value_cache, block_table, seq_lens, slot_paths, layer, scale, out)
    return out


@torch.library.custom_op("vllm_buddy::paged_attention", mutates_args=("out",))
def _paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_paths: torch.Tensor,
    layer: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    num_seqs, num_heads, head_size = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    if num_seqs == 0:
        return
    group = num_heads // num_kv_heads
    padded_head = max(MIN_PADDED, triton.next_power_of_2(head_size))
    num_splits = split_count(num_seqs, num_kv_heads, block_table.shape[1] * block_size)
    parts, lse = out, out
    if num_splits > 1:
        parts = torch.empty(num_seqs, num_heads, num_splits, head_size, dtype=torch.float32, device=query.device)
        lse = torch.empty(num_seqs, num_heads, num_splits, dtype=torch.float32, device=query.device)
    # KV heads come first: their programs share words, and lie side by side in a block.
    attend_kernel[(num_kv_heads, num_splits, num_seqs)](
        *(query, key_cache, value_cache, block_table, seq_lens, slot_paths, parts, lse),
        *(layer, scale * math.log2(math.e)),
        *query.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        block_table.stride(0),
        *parts.stride()[:2],
        GROUP=group,
        PADDED_GROUP=max(MIN_PADDED, triton.next_power_of_2(group)),
        HEAD_SIZE=head_size,
        PADDED_HEAD=padded_head,
        BLOCK_SIZE=block_size,
        TILE=tile_tokens(padded_head, key_cache.element_size()),
        NUM_SPLITS=num_splits,
        WIDEN=interpreted(),
        num_warps=NUM_WARPS,
        num_stages=1,  # The loads of K and V are behind a branch, which Triton's pipelining leaves alone.
    )
    if num_splits > 1:
        sizes = {"HEAD_SIZE": head_size, "PADDED_HEAD": padded_head, "NUM_SPLITS": num_splits}
        combine_kernel[(num_heads, num_seqs)](parts, lse, out, *out.stride()[:2], **sizes, num_warps=NUM_WARPS)


@_paged_attention.register_fake
def _(*_: object) -> None:
    return None


def _check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_paths: torch.Tensor,
    layer: int,
    out: torch.Tensor,
) -> None:
    """Raise KernelError on what the kernel would misread."""
    tensors = {"query": query, "key_cache": key_cache, "value_cache": value_cache, "out": out}
    for name, tensor in tensors.items():
        dims = 4 if "cache" in name else 3
        if tensor.dim() != dims or tensor.dtype != query.dtype or tensor.dtype not in DTYPES or tensor.stride(-1) != 1:
            raise KernelError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}; it must have {dims} "
                f"dimensions, the last contiguous, and query's dtype, one of {', '.join(map(str, DTYPES))}"
            )
    num_seqs, num_heads, head_size = query.shape
    num_blocks, block_size, num_kv_heads = key_cache.shape[:3]
    if out.shape != query.shape:
        raise KernelError(f"out is {list(out.shape)}; it must be {list(query.shape)}, as query is")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.shape != (num_blocks, block_size, num_kv_heads, head_size):
            raise KernelError(f"{name} is {list(cache.shape)}; both caches must be [.., .., .., {head_size}] and alike")
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise KernelError(f"head_size is {head_size}; it must be 1 to {MAX_HEAD_SIZE}")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise KernelError(
            f"{num_heads} query heads cannot share {num_kv_heads} KV heads; it must be a multiple of them"
        )
    if block_size < MIN_BLOCK_SIZE or block_size & (block_size - 1):
        raise KernelError(f"block_size is {block_size}; it must be a power of two of at least {MIN_BLOCK_SIZE}")
    if not 0 <= layer <= MAX_LAYER:
        raise KernelError(f"layer is {layer}; a word of slot_paths has bits for layers 0 to {MAX_LAYER}")
    integers = (
        ("block_table", block_table, torch.int32, (num_seqs, block_table.shape[-1] if block_table.dim() else 0)),
        ("seq_lens", seq_lens, torch.int32, (num_seqs,)),
        ("slot_paths", slot_paths, torch.int64, (num_blocks * block_size,)),
    )
    for name, tensor, dtype, shape in integers:
        if tensor.dtype != dtype or tensor.shape != shape or (tensor.numel() and tensor.stride(-1) != 1):
            raise KernelError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}; it must be {dtype} "
                f"{list(shape)}, the last dimension contiguous"
            )
    for name, tensor in (*tensors.items(), *((name, tensor) for name, tensor, *_ in integers)):
        if tensor.device != query.device:
            raise KernelError(f"{name} is on {tensor.device}; all must be on query's device, {query.device}")
