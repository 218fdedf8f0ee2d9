"""How a function of vLLM is wrapped, and whether what is served is routed."""

from collections.abc import Callable
from typing import Any

MODEL_IMPL = "buddy"

MARK = "_vllm_buddy_original"  # attribute of a wrapper: what it wraps


def wrap(owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the function `name` of a class or module by what `around` makes of it, unless that has been done.

    around: called with vLLM's function.
    """
    original = getattr(owner, name)
    if hasattr(original, MARK):
        return
    wrapped = around(original)
    setattr(wrapped, MARK, original)
    setattr(owner, name, wrapped)


def is_buddy(model_config: Any) -> bool:
    """Whether a model is routed. model_config: vLLM's; None: there is no model."""
    return getattr(model_config, "model_impl", None) == MODEL_IMPL


def is_routed(owner: Any) -> bool:
    """Whether what vLLM serves is routed. owner: has vLLM's ModelConfig as `model_config`, or no model at all."""
    return is_buddy(getattr(owner, "model_config", None))
