"""Chooses the KV units of a server, once for all its processes, or refuses them with the reason."""

from typing import TYPE_CHECKING

from vllm_buddy.artifact import Artifact
from vllm_buddy.errors import SettingsError
from vllm_buddy.method import LayerPath, path_of
from vllm_buddy.method.budget import MIN_DEPTH
from vllm_buddy.method.kv_policy import MASKED
from vllm_buddy.method.kv_units import KVUnits, fit_classes
from vllm_buddy.serving.compat import units_problem
from vllm_buddy.serving.start.settings import BuddySettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def kv_units(settings: BuddySettings, artifact: Artifact, vllm_config: "VllmConfig") -> KVUnits | None:
    """The KV units that the settings ask for, their classes fitted to the artifact's paths; None for `dense`.

    Raises:
        SettingsError: units cannot be had with other settings; says which, and what to do.
    """
    if settings.kv_layout == "dense":
        if "kv_classes" in settings.model_fields_set:
            raise SettingsError('kv_classes: there are classes of layers with kv_layout "units" only')
        return None
    num_layers = artifact.config.base_model.num_layers
    if reason := _why_not(settings, num_layers, vllm_config):
        raise SettingsError(f'kv_layout "units" cannot be had: {reason}; or leave kv_layout out')
    return fit_classes(expected_paths(artifact), num_layers, settings.kv_classes)


def expected_paths(artifact: Artifact) -> list[LayerPath]:
    """Paths of the artifact's library, or, where it has none, those that the prior alone gives."""
    if artifact.config.library is not None:
        return [path_of(layers) for paths in artifact.config.library.values() for layers in paths]
    depths = range(MIN_DEPTH, artifact.config.base_model.num_layers)
    return [path for path in map(artifact.first_path, depths) if path is not None]


def _why_not(settings: BuddySettings, num_layers: int, vllm_config: "VllmConfig") -> str | None:
    if reason := units_problem():
        return reason
    if settings.kv != MASKED:
        return f'KV policy "{settings.kv}" writes every layer of every token, so units would save nothing; set "masked"'
    if settings.schedule.by_token:
        return 'schedule "token" lets every token run other layers, which never come back to few; set it to "request"'
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return "the layers of a unit would lie on several stages; use tensor or data parallelism"
    if settings.max_budget < 1.0:
        return "layers above max_budget are not loaded, and a unit needs all of its layers; set max_budget to 1"
    if vllm_config.lora_config is not None:
        return "they were never tried with LoRA adapters; start without --enable-lora"
    if vllm_config.speculative_config is not None:
        return "a rejected draft may have taken up a layer; start without a speculator"
    if num_layers % settings.kv_classes or settings.kv_classes > num_layers // 2:
        fit = [n for n in range(1, num_layers // 2 + 1) if num_layers % n == 0]
        return (
            f"kv_classes {settings.kv_classes} must divide the model's {num_layers} layers and leave two units; choose "
            f"one of {', '.join(map(str, fit))}"
        )
    return None
