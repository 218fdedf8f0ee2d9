"""vLLM's own functions, behind the wrappers of the plugin."""

from typing import Any

from vllm_buddy.serving import patches


def original(function: Any) -> Any:
    """vLLM's own function behind our wrapper."""
    return getattr(function, patches._MARK, function)
