"""vLLM's own functions, behind the wrappers of the plugin."""

from typing import Any

from vllm_buddy.serving.patches.wrapping import MARK


def original(function: Any) -> Any:
    """vLLM's own function behind our wrapper."""
    return getattr(function, MARK, function)
