"""Identifies the base model of an artifact by its shape and a fingerprint of its weights.

The fingerprint is the same for a model and its quantised copies, which one artifact fits. What was computed with one of
them belongs to that one alone: it is stored under a hash of some rows of every tensor (weight_digest, model_digest).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from vllm_buddy.artifact.files import one_line
from vllm_buddy.errors import ArtifactError
from vllm_buddy.hub import is_hub_id

# The fingerprint of a model without weights: vLLM's load format "dummy" draws them at random.
NO_WEIGHTS = "no weights"

_EMBEDDING = "model.embed_tokens.weight"
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_EMBEDDING_ROWS = 64
_DIGEST_ROWS = 4  # of each tensor; other training changes all rows of the tensors that it changes


LONGEST_LINE = 500
# A name from a file, which goes into logs and messages: one line, and nothing that a terminal would obey.
Line = Annotated[str, Field(max_length=LONGEST_LINE, pattern=r"^[^\p{C}\p{Zl}\p{Zp}]*$")]


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
        config: Any = json.loads(config_path.read_text())
        if not isinstance(config, dict):
            raise ArtifactError(f"{config_path} is not an object")
        found = BaseModelIdentity(
            id=name or _hub_id(folder, config) or folder.absolute().name,
            architecture=(config.get("architectures") or ["unknown"])[0],
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            vocab_size=config["vocab_size"],
            fingerprint=NO_WEIGHTS,
        )
    except KeyError as error:
        raise ArtifactError(f"{config_path} has no {error}, so it is not that of a decoder language model") from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError, OSError) as error:
        raise ArtifactError(f"{config_path} cannot be used ({one_line(error)})") from None
    return found.model_copy(update={"fingerprint": weight_fingerprint(folder, found.num_layers)})


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


def weight_digest(folder: Path) -> str:
    """Return sixteen hex digits, a hash of evenly spaced rows of every tensor of the model in `folder`.

    It tells apart models that differ in matrices alone, such as a base model and one with a merged LoRA. Copies in
    another dtype differ too, the shards that tensors lie in do not count.

    Raises:
        ArtifactError: a safetensors file is incomplete.
    """
    digest = hashlib.sha256()
    for name, path in sorted(_tensor_files(folder).items()):
        with safe_open(path, framework="pt") as f:
            _add_rows(digest, name, rows := f.get_slice(name), rows.get_shape())
    return digest.hexdigest()[:16]


def model_digest(model: nn.Module) -> str:
    """Return sixteen hex digits, a hash of evenly spaced rows of every weight of `model`, as it is loaded."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        _add_rows(digest, name, weight.detach(), weight.shape)
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


def _add_rows(digest: Any, name: str, tensor: Any, shape: Sequence[int]) -> None:
    """Add some rows of a matrix, or all of a smaller tensor, to `digest`. tensor: one, or a slice of safetensors."""
    digest.update(f"{name} {list(shape)}".encode())
    starts = range(0, shape[0], max(1, shape[0] // _DIGEST_ROWS)) if len(shape) > 1 else ()
    for part in [tensor[start : start + 1] for start in starts] or [tensor[...]]:
        digest.update(f"{part.dtype}".encode())
        digest.update(part.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
