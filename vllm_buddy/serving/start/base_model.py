"""Checks at server start that the artifact belongs to the model that vLLM is about to load."""

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_buddy.artifact import NO_WEIGHTS, Artifact, BaseModelIdentity, identify
from vllm_buddy.errors import ArtifactError, UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

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


def check_base_model(artifact: Artifact, vllm_config: "VllmConfig") -> None:
    """Refuse an artifact that was made for another model than the one served.

    Raises:
        ArtifactError: names both models.
    """
    wanted = artifact.config.base_model
    found = identify_served_model(vllm_config)
    if not wanted.same_model(found):
        raise ArtifactError(
            f"artifact '{artifact.config.name}' was made for {wanted.summary()}, "
            f"but the model served is {found.summary()}"
        )
    num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    if num_layers != wanted.num_layers:  # the files fit, but --hf-overrides removes layers
        raise ArtifactError(
            f"artifact '{artifact.config.name}' was made for {wanted.summary()}, "
            f"but {num_layers} layers of it are to be served"
        )


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
    if load_format not in _MERGEABLE_FORMATS:
        raise UnsupportedError(
            f"{what} be done with --load-format {load_format}; use one of {', '.join(_MERGEABLE_FORMATS)}"
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
        from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

        # vLLM's worker downloads the same files a moment later, into the same cache.
        folder = Path(
            download_weights_from_hf(
                name, vllm_config.load_config.download_dir, ["*.safetensors", "config.json"], model_config.revision
            )
        )
    return identify(folder, name=name)
