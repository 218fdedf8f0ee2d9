"""What serving uses of the device it runs on: kernels and CUDA graphs. Nothing is left out silently."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform
from vllm_buddy_kernels import why_unavailable

from vllm_buddy.errors import SettingsError
from vllm_buddy.serving.start.settings import BuddySettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_MOST_ROWS = 256  # beyond, a step is long enough to launch its kernels one by one


def with_device_settings(settings: BuddySettings, vllm_config: "VllmConfig") -> BuddySettings:
    """The settings with those filled in that depend on the device.

    Raises:
        SettingsError: what was asked for cannot be had here; names the setting to use instead.
    """
    kernels = _kernels(settings)
    why_not = _why_no_graphs(settings, kernels, vllm_config)
    if settings.cuda_graphs and why_not:
        raise SettingsError(f'"cuda_graphs": true cannot be had: {why_not}; leave it out or set it to false')
    if settings.cuda_graphs is False:
        why_not = "they are switched off"
    updates: dict[str, Any] = {"kernels": kernels, "cuda_graphs": why_not is None}
    if why_not is None:
        updates["graph_sizes"] = _sizes(settings, vllm_config.scheduler_config.max_num_seqs)
    elif of_graphs := [name for name in ("graph_sizes", "graph_memory_mib") if name in settings.model_fields_set]:
        raise SettingsError(f"{', '.join(of_graphs)} without CUDA graphs: {why_not}")
    return settings.model_copy(update=updates)


def _kernels(settings: BuddySettings) -> str | None:
    on_cpu = current_platform.is_cpu()
    wanted = settings.kernels or (None if on_cpu else "triton")
    reason = why_unavailable(torch.device("cpu" if on_cpu else "cuda")) if wanted == "triton" else None
    if reason is None:
        return wanted
    instead = "leave it out: layers are compiled instead" if on_cpu else 'set "kernels": "reference" to do without'
    raise SettingsError(f'"kernels": "triton" cannot be had: {reason}; {instead}')


def _why_no_graphs(settings: BuddySettings, kernels: str | None, vllm_config: "VllmConfig") -> str | None:
    from vllm_buddy.serving.kv import POLICIES  # imports vLLM's layers

    if current_platform.is_cpu():
        return "they need a CUDA device"
    if vllm_config.model_config.enforce_eager:
        return "--enforce-eager forbids them"
    if kernels != "triton":
        return 'they are made of the kernels "triton"'
    if not POLICIES[settings.kv_policy].in_graphs:
        return f"KV policy {settings.kv_policy} cannot be captured"
    return None


def _sizes(settings: BuddySettings, max_num_seqs: int) -> tuple[int, ...]:
    """Up to the largest batch, in steps of at most half: rows that pad cost little where weights are what is read."""
    if settings.graph_sizes is not None:
        if settings.graph_sizes[-1] > max_num_seqs:
            raise SettingsError(
                f"graph_sizes go to {settings.graph_sizes[-1]}, but no step has more sequences than --max-num-seqs "
                f"{max_num_seqs}"
            )
        return settings.graph_sizes
    most = min(max_num_seqs, _MOST_ROWS)
    sizes = [size for size in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256) if size < most]
    return (*sizes, most)
