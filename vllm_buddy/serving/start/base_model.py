"""Checks at server start that the artifact belongs to the model that vLLM is about to load."""

from pathlib import Path
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_buddy.artifact import NO_WEIGHTS, Artifact, BaseModelIdentity, identify
from vllm_buddy.errors import ArtifactError, UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")

# Load formats that hand a model the tensors of its checkpoint, under their own names.
_MERGEABLE_FORMATS = (
    "auto",
    "hf",
    "safetensors",
    "pt",
    "npcache",
    "fastsafetensors",
    "instanttensor",
    "runai_streamer",
)


def check_base_model(artifact: Artifact, vllm_config: "VllmConfig", *, by_shape: bool = False) -> None:
    """Refuse an artifact that was made for another model than the one served.

    by_shape: compare the shape alone, not the weights.

    Raises:
        ArtifactError: names both models.
    """
    wanted = artifact.config.base_model
    found = identify_served_model(vllm_config)
    if not wanted.same_model(found):
        if not by_shape or wanted.shape != found.shape:
            raise ArtifactError(_made_for_another(artifact, found, vllm_config.model_config.quantization))
        logger.warning("base_check is shape: nothing says that the artifact was made for these weights")
    num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    if num_layers != wanted.num_layers:  # the files fit, but --hf-overrides removes layers
        raise ArtifactError(
            f"artifact '{artifact.config.name}' was made for {wanted.summary()}, "
            f"but {num_layers} layers of it are to be served"
        )


def _made_for_another(artifact: Artifact, found: BaseModelIdentity, quantization: str | None) -> str:
    wanted = artifact.config.base_model
    told = (
        f"artifact '{artifact.config.name}' was made for {wanted.summary()}, but the model served is {found.summary()}"
    )
    if quantization is not None and wanted.shape == found.shape:
        told += (
            f". If this is a copy of that model whose quantiser ({quantization}) scaled the norms, as those of AWQ and "
            'SmoothQuant do, set "base_check": "shape"'
        )
    return told


def check_lora(artifact: Artifact, vllm_config: "VllmConfig") -> None:
    """Refuse an artifact with a LoRA where it cannot be merged into the base weights.

    Raises:
        UnsupportedError: the weights are quantised, or vLLM loads them in a form of its own.
    """
    if artifact.lora is None:
        return
    what = f"artifact '{artifact.config.name}' changes the base weights (recipe {artifact.config.recipe}), which cannot"
    quantization = vllm_config.model_config.quantization
    if quantization is not None:
        raise UnsupportedError(
            f"{what} be done where they are quantised ({quantization}); serve the unquantised model, or an artifact "
            "with a bypass, which leaves the base weights alone"
        )
    load_format = vllm_config.load_config.load_format
    if load_format == "auto" and _has_mistrals_files(vllm_config):
        raise UnsupportedError(
            f"{what} be done in Mistral's own files, consolidated*.safetensors, which vLLM takes where there are some; "
            "add --load-format safetensors"
        )
    if load_format not in _MERGEABLE_FORMATS:
        raise UnsupportedError(
            f"{what} be done with --load-format {load_format}; use one of {', '.join(_MERGEABLE_FORMATS)}"
        )


def _has_mistrals_files(vllm_config: "VllmConfig") -> bool:
    """Whether vLLM would load the weights under Mistral's names: as its DefaultModelLoader finds out."""
    from vllm.transformers_utils.repo_utils import list_filtered_repo_files

    model_config = vllm_config.model_config
    return bool(
        list_filtered_repo_files(
            model_name_or_path=str(model_config.model),
            allow_patterns=["consolidated*.safetensors"],
            revision=model_config.revision,
        )
    )


def identify_served_model(vllm_config: "VllmConfig") -> BaseModelIdentity:
    """The model that vLLM is about to load. Downloads it where it is a hub id; dummy weights have no fingerprint."""
    model_config = vllm_config.model_config
    name = str(model_config.model)
    if vllm_config.load_config.load_format == "dummy":
        hf_config = model_config.hf_text_config
        return BaseModelIdentity(
            id=name,
            architecture=model_config.architectures[0],
            num_layers=hf_config.num_hidden_layers,
            hidden_size=hf_config.hidden_size,
            vocab_size=hf_config.vocab_size,
            fingerprint=NO_WEIGHTS,
        )
    folder = Path(name)
    if not folder.is_dir():
        folder = _downloaded(name, vllm_config)
    return identify(folder, name=name)


def _downloaded(name: str, vllm_config: "VllmConfig") -> Path:
    """The folder of a hub's model: config.json, and the weights, which vLLM's worker finds there a moment later."""
    from vllm.model_executor.model_loader.weight_utils import (
        download_weights_from_hf,
        maybe_download_from_modelscope,
    )

    cache, revision = vllm_config.load_config.download_dir, vllm_config.model_config.revision
    folder = maybe_download_from_modelscope(name, revision, cache)
    if folder is None:
        folder = download_weights_from_hf(name, cache, ["*.safetensors"], revision)
        # On its own: vLLM downloads what the first pattern that matches something stands for.
        download_weights_from_hf(name, cache, ["config.json"], revision)
    return Path(folder)
