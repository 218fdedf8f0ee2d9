"""FlashAttention as vLLM's backend calls it, on a packed cache of the tokens that are valid in a slot-aligned one."""

from collections.abc import Callable
from typing import Any

import torch

Launch = Callable[[], tuple[torch.Tensor]]
MAX_SPLITS = 32  # vLLM's flash_attn_max_num_splits_for_cuda_graph


def why_unavailable() -> str | None:
    """Why there is no FlashAttention here; None if there is."""
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        return str(error)
    return None if get_flash_attn_version() in (2, 3) else "vLLM has no version 2 or 3 for this device"


def pack(
    key_cache: torch.Tensor, value_cache: torch.Tensor, block_table: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The valid tokens of each sequence in blocks of their own, and the block table of those.

    valid: [num_seqs, positions], bool, as many in each row, a multiple of the block size. Returns the cache in vLLM's
    layout, [num_blocks, num_kv_heads, block_size, 2 * head_size].
    """
    block_size = key_cache.shape[1]
    num_seqs, positions = valid.shape
    offset = torch.arange(positions, device=valid.device).expand_as(valid) % block_size
    block = block_table.long().repeat_interleave(block_size, 1)
    tokens = (cache[block[valid], offset[valid]] for cache in (key_cache, value_cache))
    packed = torch.cat(tuple(tokens), -1).unflatten(0, (-1, block_size)).transpose(1, 2).contiguous()
    table = torch.arange(len(packed), dtype=torch.int32, device=valid.device).view(num_seqs, -1)
    return packed, table


def launch(arguments: tuple[Any, ...]) -> Launch:
    """FlashAttention on what `paged_attention` gets as `arguments`, packed."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    query, key_cache, value_cache, block_table, seq_lens, slot_paths, layer, scale = arguments
    num_seqs, num_heads, head_size = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    words = slot_paths.view(-1, block_size)[block_table.long()].flatten(1)
    packed, table = pack(key_cache, value_cache, block_table, ((words >> layer) & 1).bool())
    keys, values = packed.transpose(1, 2).split(head_size, -1)
    length = table.shape[1] * block_size
    lengths = torch.full_like(seq_lens, length)
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=query.device)
    version = get_flash_attn_version()
    schedule: dict[str, Any] = {"fa_version": version}
    if version == 3:
        # vLLM makes the schedule once a step, so that it is no part of a layer's time.
        schedule["num_splits"] = MAX_SPLITS
        schedule["scheduler_metadata"] = get_scheduler_metadata(
            batch_size=num_seqs,
            max_seqlen_q=1,
            max_seqlen_k=length,
            num_heads_q=num_heads,
            num_heads_kv=num_kv_heads,
            headdim=head_size,
            cache_seqlens=lengths,
            qkv_dtype=query.dtype,
            cu_seqlens_q=starts,
            page_size=block_size,
            causal=True,
            num_splits=MAX_SPLITS,
        )
    out = torch.empty_like(query)

    def run() -> tuple[torch.Tensor]:
        flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=lengths,
            max_seqlen_k=length,
            softmax_scale=scale,
            causal=True,
            window_size=[-1, -1],
            block_table=table,
            **schedule,
        )
        return (out,)

    return run
