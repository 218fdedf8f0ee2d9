"""The artifact on disk: what training makes and serving loads.

A Hugging Face folder: `buddy_config.json` (this schema), `model.safetensors` (prior, folded Decision Module),
`README.md` (model card) and `run.yaml` (how it was made).
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as FilePath

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from vllm_buddy.errors import ArtifactError
from vllm_buddy.fingerprint import BaseModelIdentity
from vllm_buddy.method import FoldedDecision, Router, path_of
from vllm_buddy.method.router import OMEGA

FORMAT_VERSION = 1
CONFIG_FILE = "buddy_config.json"
WEIGHTS_FILE = "model.safetensors"
SHIPPED_DIR = FilePath(__file__).parent / "artifacts"

_DECISION_TENSORS = ("table_context", "table_newest", "b1", "w2", "b2")


class PriorConfig(BaseModel):
    """Where the static layer importance comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    indicator: str = Field(description="taylor, delta_ppl or cosine (method.md calls the last Block Influence)")
    calibration: str = Field(description="name of the calibration text")
    num_tokens: int = Field(description="calibration tokens measured")


class BuddyConfig(BaseModel):
    """`buddy_config.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = Field(description="this schema's version")
    name: str = Field(description="name of the artifact")
    base_model: BaseModelIdentity = Field(description="the model it was made for")
    prior: PriorConfig
    omega: float = Field(default=OMEGA, description="weight of the standardised prior beside the trained scores")
    has_decision_module: bool = Field(description="false: the path follows the prior alone")
    library: dict[int, list[list[int]]] | None = Field(
        default=None, description="for each depth, the layer sets that `paths: library` lets the router pick from"
    )


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact. prior: [num_layers - 2] float32, normalised, larger is more important."""

    config: BuddyConfig
    prior: np.ndarray
    decision: FoldedDecision | None = None

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits that change with anything that can change a path."""
        h = hashlib.sha256(self.config.model_dump_json().encode())
        for _, array in sorted(self._tensors().items()):
            h.update(np.ascontiguousarray(array).tobytes())
        return h.hexdigest()[:16]

    def router(self, *, library: bool = False) -> Router:
        """The router of this artifact. library: pick among the artifact's fixed list of paths only.

        Raises:
            ArtifactError: a library was asked for and the artifact has none.
        """
        paths = None
        if library:
            if not self.config.library:
                raise ArtifactError(
                    f'artifact \'{self.config.name}\' has no path library; serve it with "paths": "free" or write '
                    "one with `vllm-buddy prior --library N`"
                )
            paths = {depth: [path_of(layers) for layers in sets] for depth, sets in self.config.library.items()}
        return Router(self.config.base_model.num_layers, self.prior, self.decision, self.config.omega, paths)

    def save(self, folder: FilePath) -> None:
        """Write `buddy_config.json` and `model.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        # Not safetensors' own save_file: it makes a file that only its owner can read.
        (folder / WEIGHTS_FILE).write_bytes(save(self._tensors()))
        (folder / CONFIG_FILE).write_text(_one_line_per_path(self.config.model_dump_json(indent=2)) + "\n")

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = {"prior": self.prior.astype(np.float32)}
        if self.decision is not None:
            tensors |= {
                f"decision.{name}": np.ascontiguousarray(getattr(self.decision, name)) for name in _DECISION_TENSORS
            }
        return tensors


def load_artifact(folder: FilePath) -> Artifact:
    """Read an artifact folder.

    Raises:
        ArtifactError: missing, truncated, inconsistent or of a newer format; says what was found and wanted.
    """
    config = _read_config(folder)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise ArtifactError(f"artifact {folder} has no {WEIGHTS_FILE}")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{weights} is not a complete safetensors file ({error}); get the artifact again") from None
    base = config.base_model
    num_middle = base.num_layers - 2
    shapes: dict[str, tuple[int | None, ...]] = {"prior": (num_middle,)}
    if config.has_decision_module:
        shapes |= {
            "decision.table_context": (base.vocab_size, None),
            "decision.table_newest": (base.vocab_size, None),
            "decision.b1": (None,),
            "decision.w2": (num_middle, None),
            "decision.b2": (num_middle,),
        }
    for name, shape in shapes.items():
        found = tensors[name].shape if name in tensors else None
        if found is None or len(found) != len(shape) or any(w not in (None, f) for w, f in zip(shape, found)):
            raise ArtifactError(f"{weights}: tensor '{name}' has shape {found}, expected {shape} for {base.summary()}")
        if not np.isfinite(tensors[name]).all():
            raise ArtifactError(f"{weights}: tensor '{name}' holds values that are not finite")
    decision = None
    if config.has_decision_module:
        parts = {name: tensors[f"decision.{name}"].astype(np.float32) for name in _DECISION_TENSORS}
        widths = {parts["table_context"].shape[1], parts["table_newest"].shape[1], parts["w2"].shape[1]}
        if widths != {parts["b1"].shape[0]}:
            raise ArtifactError(f"{weights}: the Decision Module's tensors disagree on its width: {sorted(widths)}")
        decision = FoldedDecision(**parts)
    _check_library(config, folder)
    return Artifact(config, tensors["prior"].astype(np.float32), decision)


def shipped_artifacts() -> dict[str, FilePath]:
    """Artifacts that come with the package: name -> folder."""
    return {p.name: p for p in sorted(SHIPPED_DIR.iterdir()) if (p / CONFIG_FILE).is_file()}


def _read_config(folder: FilePath) -> BuddyConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ArtifactError(f"no artifact at {folder}: {CONFIG_FILE} is missing")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not JSON ({error})") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {version}, this vllm_buddy reads up to {FORMAT_VERSION}; update vllm_buddy"
        )
    try:
        return BuddyConfig.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{path} does not fit the schema: {error}") from None


def _one_line_per_path(indented_json: str) -> str:
    """A library is thousands of numbers; a number a line would make the file unreadable."""
    return re.sub(
        r"\[[\d,\s]+\]", lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), indented_json
    )


def _check_library(config: BuddyConfig, folder: FilePath) -> None:
    last = config.base_model.num_layers - 1
    for depth, sets in (config.library or {}).items():
        if not sets:
            raise ArtifactError(f"{folder / CONFIG_FILE}: the library holds no path of {depth} layers")
        for layers in sets:
            if len(set(layers)) != depth or not {0, last} <= set(layers) or max(layers) > last or min(layers) < 0:
                raise ArtifactError(
                    f"{folder / CONFIG_FILE}: library path {layers} is not a set of {depth} layers with 0 and {last}"
                )
