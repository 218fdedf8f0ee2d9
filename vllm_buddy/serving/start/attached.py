"""What the config hook attaches to vLLM's ModelConfig, which carries it to every process, and how it is read there."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_buddy.method.kv_units import KVUnits
    from vllm_buddy.serving.admission.limits import RequestLimits
    from vllm_buddy.serving.start.agreement import Served


def attach(model_config: Any, limits: "RequestLimits", units: "KVUnits | None", served: "Served") -> None:
    """Attach what a server allows, the units of its KV cache and what its processes must agree on.

    model_config: vLLM's; here and below.
    """
    model_config.buddy_limits = limits
    model_config.buddy_kv_units = units
    model_config.buddy_served = served


def limits_of(model_config: Any) -> "RequestLimits":
    """What the server allows its requests."""
    limits: RequestLimits = model_config.buddy_limits
    return limits


def kv_units_of(model_config: Any) -> "KVUnits | None":
    """The units of the KV cache; None in the dense layout."""
    units: KVUnits | None = model_config.buddy_kv_units
    return units


def served_of(model_config: Any) -> "Served":
    """What the process that was configured first serves."""
    served: Served = model_config.buddy_served
    return served
