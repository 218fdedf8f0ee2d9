"""Identifies the base model of an artifact by its shape and a fingerprint of its weights."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from vllm_buddy.artifact.files import one_line
from vllm_buddy.errors import ArtifactError
from vllm_buddy.hub import is_hub_id

# The fingerprint of a model without weights: vLLM's load format "dummy" draws them at random.
NO_WEIGHTS = "no weights"

_EMBEDDING = "model.embed_tokens.weight"
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_EMBEDDING_ROWS = 64


# A name from a file, which goes into logs and messages: one line, and nothing that a terminal would obey.
Line = Annotated[str, Field(max_length=500, pattern=r"^[^\p{C}\p{Zl}\p{Zp}]*$")]


class BaseModelIdentity(BaseModel):
    """The identity of a base model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Line = Field(description="hub id or name, for display only")
    revision: Line | None = Field(default=None, description="hub revision, if there is one")
    architecture: Line = Field(description="for example LlamaForCausalLM")
    # Larger than any model: a path is a number of as many bits, and tables have a row for each token id.
    num_layers: int = Field(ge=3, le=4096)
    hidden_size: int = Field(ge=1, le=1 << 20)
    vocab_size: int = Field(ge=1, le=1 << 24)
    fingerprint: Line = Field(description="weight fingerprint, see vllm_buddy.artifact.fingerprint")

    def summary(self) -> str:
        """Return one line for error messages."""
        return (
            f"{self.id} ({self.architecture}, {self.num_layers} layers, hidden {self.hidden_size}, "
            f"vocabulary {self.vocab_size}, fingerprint {self.fingerprint})"
        )

    @property
    def shape(self) -> tuple[str, int, int, int]:
        """Architecture, layers, hidden size and vocabulary, which must agree even where there are no weights."""
        return (self.architecture, self.num_layers, self.hidden_size, self.vocab_size)

    def same_model(self, other: "BaseModelIdentity") -> bool:
        """Whether `other`, the model at hand, has the shape and the weights of this one.

        Names and quantisation do not count. If `other` has no weights (fingerprint NO_WEIGHTS), the shape decides.
        """
        return self.shape == other.shape and other.fingerprint in (self.fingerprint, NO_WEIGHTS)


def identify(folder: Path, name: str | None = None) -> BaseModelIdentity:
    """Return the identity of the Hugging Face model in `folder` (config.json and safetensors).

    name: the identity's `id`; None: the hub id that config.json or the hub's cache says, else the folder's name.

    Raises:
        ArtifactError: config.json is missing or does not describe a decoder with at least three layers, or the
            safetensors are missing or incomplete.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ArtifactError(f"{folder} holds no config.json, so it is not a Hugging Face model folder")
    try:
        config: dict[str, Any] = json.loads(config_path.read_text())
        return BaseModelIdentity(
            id=name or _hub_id(folder, config) or folder.absolute().name,
            architecture=(config.get("architectures") or ["unknown"])[0],
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            vocab_size=config["vocab_size"],
            fingerprint=weight_fingerprint(folder, config["num_hidden_layers"]),
        )
    except KeyError as error:
        raise ArtifactError(f"{config_path} has no {error}, so it is not that of a decoder language model") from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise ArtifactError(f"{config_path} cannot be used ({one_line(error)})") from None


def _hub_id(folder: Path, config: dict[str, Any]) -> str | None:
    """The hub id of a model: in its configuration, or in the name of its folder in the hub's cache."""
    named = config.get("_name_or_path")
    if isinstance(named, str) and is_hub_id(named):
        return named
    parts = folder.absolute().parts  # .../models--OWNER--NAME/snapshots/COMMIT
    repository = parts[-3] if len(parts) > 2 and parts[-2] == "snapshots" else ""
    return repository.removeprefix("models--").replace("--", "/", 1) if repository.startswith("models--") else None


def weight_fingerprint(folder: Path, num_layers: int) -> str:
    """Return sixteen hex digits, a hash of every layer norm and of evenly spaced rows of the token embedding in bf16.

    Rounding weights leaves these tensors alone, so a copy of a model that is quantised so has the model's fingerprint.
    Training all weights of the model changes it, and so does a quantiser that scales norms.

    Raises:
        ArtifactError: a safetensors file is incomplete, or one of these tensors is missing.
    """
    files = _tensor_files(folder)
    names = [f"model.layers.{i}.{norm}" for i in range(num_layers) for norm in _NORMS] + ["model.norm.weight"]
    missing = [name for name in (*names, _EMBEDDING) if name not in files]
    if missing:
        raise ArtifactError(f"{folder}: cannot take a weight fingerprint, no tensor {missing[0]!r} in its safetensors")
    digest = hashlib.sha256()
    for name in names:
        with safe_open(files[name], framework="pt") as f:
            digest.update(_bf16_bytes(f.get_tensor(name)))
    with safe_open(files[_EMBEDDING], framework="pt") as f:
        rows = f.get_slice(_EMBEDDING)
        num_rows = rows.get_shape()[0]
        for row in range(0, num_rows, max(1, num_rows // _EMBEDDING_ROWS)):
            digest.update(_bf16_bytes(rows[row : row + 1]))
    return digest.hexdigest()[:16]


def _tensor_files(folder: Path) -> dict[str, Path]:
    return {name: path for path in sorted(folder.glob("*.safetensors")) for name in _names(path)}


def _names(path: Path) -> Iterator[str]:
    try:
        with safe_open(path, framework="pt") as f:
            yield from f.keys()
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not a complete safetensors file ({error}); get the model again") from None


def _bf16_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
