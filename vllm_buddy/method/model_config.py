"""Which models can be routed, by their configuration."""

from typing import Any

from vllm_buddy.errors import UnsupportedError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# Settings of Mistral's configuration that give its layers another formula.
_OTHER_LAYERS = ("sliding_window", "llama_4_scaling", "ada_rms_norm_t_cond")


def check_config(config: Any) -> None:
    """Raise UnsupportedError unless `config` describes a dense Llama, Mistral, Qwen2 or Qwen3 with full attention."""
    if config.model_type not in MODEL_TYPES:
        raise UnsupportedError(f"model type {config.model_type!r} is not supported; known are {', '.join(MODEL_TYPES)}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedError(f"layers with {', '.join(sorted(kinds - {'full_attention'}))} are not supported")
    for name in _OTHER_LAYERS:
        if getattr(config, name, None):
            raise UnsupportedError(f"a model with {name} in its configuration is not supported")
