"""Fills in the settings that depend on the device: which kernels, whether CUDA graphs, for which batch sizes.

What was asked for and cannot be had refuses the start; nothing is left out silently.
"""

from typing import TYPE_CHECKING

import torch
from vllm.platforms import current_platform
from vllm_buddy_kernels import why_unavailable

from vllm_buddy.errors import SettingsError
from vllm_buddy.serving.start.setting_sections import GraphSettings
from vllm_buddy.serving.start.settings import BuddySettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_MOST_ROWS = 256  # a larger step takes long enough to launch its kernels one by one


def with_device_settings(settings: BuddySettings, vllm_config: "VllmConfig") -> BuddySettings:
    """The settings with `kernels`, `graphs.enabled` and `graphs.sizes` filled in for this device.

    Raises:
        SettingsError: a setting cannot be fulfilled here; names the setting to use instead.
    """
    kernels = _kernels(settings)
    graphs = settings.graphs
    why_not = _why_no_graphs(settings, kernels, vllm_config)
    if graphs.enabled and why_not:
        raise SettingsError(f'"graphs.enabled": true cannot be had: {why_not}; leave it out or set it to false')
    if graphs.enabled is False:
        why_not = "they are switched off"
    if why_not is None:
        sizes = _sizes(graphs, vllm_config.scheduler_config.max_num_seqs)
        graphs = graphs.model_copy(update={"enabled": True, "sizes": sizes})
    elif useless := sorted(f"graphs.{name}" for name in graphs.model_fields_set - {"enabled"}):
        raise SettingsError(f"{', '.join(useless)} without CUDA graphs: {why_not}")
    else:
        graphs = graphs.model_copy(update={"enabled": False})
    return settings.model_copy(update={"kernels": kernels, "graphs": graphs})


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
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return "they were never tried with pipeline parallelism"
    if vllm_config.speculative_config is not None and vllm_config.speculative_config.method == "eagle3":
        return "they do not keep the states between layers from which EAGLE-3 drafts"
    if not POLICIES[settings.kv].in_graphs:
        return f"KV policy {settings.kv} cannot be captured"
    return None


def _sizes(graphs: GraphSettings, max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes to capture. Each is at most twice the one before: padding is cheap where weights are what is read."""
    if graphs.sizes is not None:
        if graphs.sizes[-1] > max_num_seqs:
            raise SettingsError(
                f"graphs.sizes go to {graphs.sizes[-1]}, but no step has more sequences than --max-num-seqs "
                f"{max_num_seqs}"
            )
        return graphs.sizes
    most = min(max_num_seqs, _MOST_ROWS)
    sizes = [size for size in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256) if size < most]
    return (*sizes, most)
