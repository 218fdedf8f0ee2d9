"""Patches of vLLM's model registry: an architecture stands for its routed class under `--model-impl buddy`."""

from collections.abc import Callable
from typing import Any

from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import _ModelRegistry

from vllm_buddy.errors import UnsupportedError
from vllm_buddy.serving.patches.wrapping import is_buddy, wrap
from vllm_buddy.serving.start.hook import BuddyModelConfig

# vLLM's architecture name -> our class, as registered below.
ROUTED_ARCHITECTURES = {
    "LlamaForCausalLM": "BuddyLlamaForCausalLM",
    "MistralForCausalLM": "BuddyMistralForCausalLM",
    "Qwen2ForCausalLM": "BuddyQwen2ForCausalLM",
    "Qwen3ForCausalLM": "BuddyQwen3ForCausalLM",
}
_MODELS_MODULE = "vllm_buddy.serving.forward.models"


def register_models() -> None:
    """Register the routed model classes, and the config hook of each, with vLLM."""
    for routed in ROUTED_ARCHITECTURES.values():
        # As a string, so that vLLM imports the model code only in the processes that need it.
        if routed not in ModelRegistry.models:
            ModelRegistry.register_model(routed, f"{_MODELS_MODULE}:{routed}")
        MODELS_CONFIG_MAP[routed] = BuddyModelConfig


def wrap_normalize_arch() -> None:
    """Map a supported architecture to its routed class, and refuse the others by name.

    Why: `--model-impl` accepts any string, but the registry knows a fixed list of implementations.
    Nearest hook: `--model-class-overrides`, which does not look at `--model-impl` and calls no config hook.
    Remove when: ModelRegistry can register an implementation for a value of `--model-impl`.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def normalize_arch(self: Any, architecture: str, model_config: Any) -> str:
            if not is_buddy(model_config):
                return original(self, architecture, model_config)
            if architecture not in ROUTED_ARCHITECTURES:
                raise UnsupportedError(
                    f"--model-impl buddy does not support the architecture {architecture!r}; "
                    f"supported are {', '.join(ROUTED_ARCHITECTURES)}"
                )
            return ROUTED_ARCHITECTURES[architecture]

        return normalize_arch

    wrap(_ModelRegistry, "_normalize_arch", around)
