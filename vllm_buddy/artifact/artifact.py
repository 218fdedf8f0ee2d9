"""The artifact on disk: what training makes and serving loads.

A Hugging Face folder: `buddy_config.json` (see artifact_config), `model.safetensors` (prior, folded Decision Module,
bypass or LoRA, folded Budget Predictor), `README.md` (model card) and `run.yaml` (how it was made).

| tensor | shape and type |
|---|---|
| `prior` | [num_middle], float32 |
| `decision.table_context`, `decision.table_newest` | [vocab_size, r], int8 |
| `decision.table_context_scale`, `decision.table_newest_scale` | [r], float32, by which the columns are multiplied |
| `decision.b1`, `decision.w2`, `decision.b2` | [r], [num_middle, r], [num_middle], float32 |
| `predictor.*` | as `decision.*`, with as many outputs as the predictor's grid has steps |
| `bypass.down`, `bypass.up` | [num_middle, rank, hidden_size], [num_middle, hidden_size, rank], int8 |
| `bypass.down_scale`, `bypass.up_scale` | [num_middle * rank], [num_middle * hidden_size], float32, of the rows |
| `lora.NAME.a`, `lora.NAME.b` | [rank, in], [out, rank], float16; NAME as in Hugging Face, without `.weight` |

What is not on a grid of 8 bits has no scale: tables are then float32, as all are in format version 1, and bypasses
float16.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from vllm_buddy.artifact.config import FORMAT_VERSION, BuddyConfig
from vllm_buddy.artifact.fingerprint import BaseModelIdentity
from vllm_buddy.errors import ArtifactError
from vllm_buddy.method import FoldedDecision, FoldedPredictor, PathSchedule, Router, path_of
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.byte_grid import byte_grid
from vllm_buddy.method.lora import LoraDeltas

CONFIG_FILE = "buddy_config.json"
WEIGHTS_FILE = "model.safetensors"
SHIPPED_DIR = Path(__file__).parent.parent / "shipped"

RepairKind = Literal["none", "bypass", "lora"]

_DECISION, _PREDICTOR = "decision", "predictor"
_TABLES = ("table_context", "table_newest")
_BYPASS_TENSORS = ("down", "up")
_DECISION_TENSORS = (*_TABLES, "b1", "w2", "b2")


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact. prior: [num_layers - 2] float32, normalised, larger is more important.

    bypass, lora: in float32 here.
    """

    config: BuddyConfig
    prior: np.ndarray
    decision: FoldedDecision | None = None
    bypass: Bypass | None = None
    lora: LoraDeltas | None = None
    predictor: FoldedPredictor | None = None

    @property
    def repair(self) -> RepairKind:
        """What makes up for skipped layers. bypass: runs where a layer is skipped; lora: in the weights, at no cost."""
        if self.bypass is not None:
            return "bypass"
        return "none" if self.lora is None else "lora"

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits that change with anything that can change a path or what a path computes."""
        # Not with the format: an artifact that is saved again by a later version is the same.
        h = hashlib.sha256(self.config.model_dump_json(exclude={"format_version"}).encode())
        for _, array in sorted(self._tensors().items()):
            h.update(np.ascontiguousarray(array).tobytes())
        return h.hexdigest()[:16]

    def without_predictor(self) -> "Artifact":
        """The same routing and repair, with no budget `auto`."""
        return replace(self, config=self.config.model_copy(update={"predictor": None}), predictor=None)

    def router(self, *, library: bool | None = None) -> Router:
        """The router of this artifact.

        library: pick among the artifact's fixed list of paths only. None: if it has both that and a Decision Module,
            which was then trained to.

        Raises:
            ArtifactError: a library was asked for and the artifact has none.
        """
        paths = None
        if library is None:
            library = self.config.has_decision_module and self.config.library is not None
        if library:
            if not self.config.library:
                raise ArtifactError(
                    f'artifact \'{self.config.name}\' has no path library; serve it with "paths": "free" or write '
                    "one with `vllm-buddy prior --library N`"
                )
            paths = {depth: [path_of(layers) for layers in sets] for depth, sets in self.config.library.items()}
        return Router(self.config.base_model.num_layers, self.prior, self.decision, self.config.omega, paths)

    def schedule(self, route_every: int | None = None, lag: int = 0) -> PathSchedule:
        """When requests are routed again. route_every: what the user asks for; None: what suits the artifact."""
        interval = route_every if route_every is not None else self.config.route_every
        return PathSchedule(lag=lag) if interval is None else PathSchedule(interval, lag)

    def save(self, folder: Path) -> None:
        """Write `buddy_config.json` and `model.safetensors`.

        Raises:
            ArtifactError: what would be written could not be loaded.
        """
        config = self.config.model_copy(update={"format_version": FORMAT_VERSION})
        tensors = self._tensors()
        stored = _parse(config, tensors, f"artifact '{config.name}'")
        if _constants(stored) != _constants(self):
            raise ArtifactError(
                f"artifact '{config.name}': bypass_eps, lora.alpha and predictor.depths of the configuration are "
                f"{_constants(stored)}, those of the weights are {_constants(self)}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        # Not safetensors' own save_file: it makes a file that only its owner can read.
        (folder / WEIGHTS_FILE).write_bytes(save(tensors))
        (folder / CONFIG_FILE).write_text(_one_line_per_path(config.model_dump_json(indent=2)) + "\n")

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = {"prior": self.prior.astype(np.float32)}
        predictor = None if self.predictor is None else self.predictor.decision
        for part, folded in ((_DECISION, self.decision), (_PREDICTOR, predictor)):
            for name in () if folded is None else _DECISION_TENSORS:
                array = getattr(folded, name)
                tensors |= _in_bytes(f"{part}.{name}", array, array) if name in _TABLES else {f"{part}.{name}": array}
        if self.bypass is not None:
            for name in _BYPASS_TENSORS:
                weight = getattr(self.bypass, name).detach().cpu()
                tensors |= _in_bytes(f"bypass.{name}", _rows_as_columns(weight.float().numpy()), _half(weight))
        if self.lora is not None:
            for part in ("a", "b"):
                tensors |= {f"lora.{name}.{part}": _half(t) for name, t in getattr(self.lora, part).items()}
        return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def load_artifact(folder: Path) -> Artifact:
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
    _check_library(config, folder)
    return _parse(config, tensors, str(weights))


def _parse(config: BuddyConfig, tensors: dict[str, np.ndarray], source: str) -> Artifact:
    """The artifact of `tensors`. source: where they are from, for errors."""
    base = config.base_model
    num_middle = base.num_layers - 2
    shapes: dict[str, tuple[int | None, ...]] = {"prior": (num_middle,)}
    if config.has_decision_module:
        shapes |= _decision_shapes(_DECISION, base.vocab_size, num_middle, tensors)
    if config.predictor is not None:
        shapes |= _decision_shapes(_PREDICTOR, base.vocab_size, len(config.predictor.depths) - 1, tensors)
    if config.bypass_rank:
        shapes["bypass.down"] = (num_middle, config.bypass_rank, base.hidden_size)
        shapes["bypass.up"] = (num_middle, base.hidden_size, config.bypass_rank)
        for name in ("bypass.down", "bypass.up"):
            if name in tensors and tensors[name].dtype == np.int8:
                shapes[f"{name}_scale"] = (math.prod(tensors[name].shape[:2]),)
    names = []
    if config.lora is not None:
        names = sorted({name[5:-2] for name in tensors if name.startswith("lora.") and name.endswith((".a", ".b"))})
        for name in names:
            shapes |= {f"lora.{name}.a": (config.lora.rank, None), f"lora.{name}.b": (None, config.lora.rank)}
        if not names:
            raise ArtifactError(f"{source}: the configuration has a LoRA, of which there is no tensor")
    for name, shape in shapes.items():
        found = tensors[name].shape if name in tensors else None
        if found is None or len(found) != len(shape) or any(w not in (None, f) for w, f in zip(shape, found)):
            raise ArtifactError(f"{source}: tensor '{name}' has shape {found}, expected {shape} for {base.summary()}")
        if not np.isfinite(tensors[name]).all():
            raise ArtifactError(f"{source}: tensor '{name}' holds values that are not finite")
    if unknown := tensors.keys() - shapes.keys():
        raise ArtifactError(f"{source}: the configuration says nothing of tensor '{min(unknown)}'")
    decision = bypass = lora = predictor = None
    if config.has_decision_module:
        decision = _decision(_DECISION, tensors, source)
    if config.predictor is not None:
        predictor = FoldedPredictor(_decision(_PREDICTOR, tensors, source), config.predictor.depths, base.num_layers)
    if config.bypass_rank:
        down, up = (_bypass_weight(tensors, f"bypass.{name}") for name in _BYPASS_TENSORS)
        bypass = Bypass(down, up, config.bypass_eps)
    if config.lora is not None:
        a, b = ({name: _float32(tensors[f"lora.{name}.{part}"]) for name in names} for part in ("a", "b"))
        lora = LoraDeltas(a, b, config.lora.alpha)
    return Artifact(config, tensors["prior"].astype(np.float32), decision, bypass, lora, predictor)


def _decision_shapes(
    part: str, vocab_size: int, num_outputs: int, tensors: dict[str, np.ndarray]
) -> dict[str, tuple[int | None, ...]]:
    shapes: dict[str, tuple[int | None, ...]] = {f"{part}.{name}": (vocab_size, None) for name in _TABLES}
    scales = [name for name in shapes if name in tensors and tensors[name].dtype == np.int8]
    shapes |= {f"{name}_scale": (None,) for name in scales}
    return shapes | {f"{part}.b1": (None,), f"{part}.w2": (num_outputs, None), f"{part}.b2": (num_outputs,)}


def _decision(part: str, tensors: dict[str, np.ndarray], source: str) -> FoldedDecision:
    parts = {name: tensors[f"{part}.{name}"].astype(np.float32) for name in _DECISION_TENSORS}
    widths = {parts[name].shape[-1] for name in (*_TABLES, "b1", "w2")}
    scales = {name: tensors.get(f"{part}.{name}_scale") for name in _TABLES}
    widths |= {len(scale) for scale in scales.values() if scale is not None}
    if len(widths) > 1:
        raise ArtifactError(f"{source}: the tensors {part}.* disagree on their width: {sorted(widths)}")
    for name, scale in scales.items():
        if scale is not None:
            parts[name] *= scale
    return FoldedDecision(**parts)


def _in_bytes(name: str, array: np.ndarray, otherwise: np.ndarray) -> dict[str, np.ndarray]:
    """`array` [rows, columns] as 8-bit codes in the shape of `otherwise` if no bit is lost by it, else `otherwise`."""
    codes, scale = byte_grid(array)
    if not np.array_equal(codes * scale, array):
        return {name: otherwise}
    if otherwise.ndim == 3:
        codes = codes.T.reshape(otherwise.shape)
    return {name: codes, f"{name}_scale": scale}


def _rows_as_columns(weight: np.ndarray) -> np.ndarray:
    """[n, rows, width] -> [width, n * rows]: every row of every matrix has a scale of its own."""
    return weight.reshape(-1, weight.shape[-1]).T


def _bypass_weight(tensors: dict[str, np.ndarray], name: str) -> torch.Tensor:
    weight = tensors[name].astype(np.float32)
    if (scale := tensors.get(f"{name}_scale")) is not None:
        weight *= scale.reshape(*weight.shape[:2], 1)
    return torch.from_numpy(weight)


def _constants(artifact: Artifact) -> tuple[float | None, float | None, tuple[int, ...] | None]:
    return (
        None if artifact.bypass is None else artifact.bypass.eps,
        None if artifact.lora is None else artifact.lora.alpha,
        None if artifact.predictor is None else artifact.predictor.depths,
    )


def _half(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float16).numpy()


def _float32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))


def shipped_artifacts() -> dict[str, Path]:
    """Artifacts that come with the package: name -> folder."""
    return {p.name: p for p in sorted(SHIPPED_DIR.iterdir()) if (p / CONFIG_FILE).is_file()}


def artifact_folder(name: str | None, base: BaseModelIdentity) -> Path:
    """Folder of a shipped artifact's name, or `name` itself; None: of the shipped artifact for the model `base`.

    Raises:
        ArtifactError: no shipped one is for that model.
    """
    shipped = shipped_artifacts()
    if name is not None:
        return shipped.get(name, Path(name))
    for folder in shipped.values():
        if load_artifact(folder).config.base_model.same_model(base):
            return folder
    raise ArtifactError(
        f"no shipped artifact fits the model {base.summary()}; shipped are {', '.join(shipped)}. Name one that does"
    )


def _read_config(folder: Path) -> BuddyConfig:
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


def _check_library(config: BuddyConfig, folder: Path) -> None:
    last = config.base_model.num_layers - 1
    for depth, sets in (config.library or {}).items():
        if not sets:
            raise ArtifactError(f"{folder / CONFIG_FILE}: the library holds no path of {depth} layers")
        for layers in sets:
            if len(set(layers)) != depth or not {0, last} <= set(layers) or max(layers) > last or min(layers) < 0:
                raise ArtifactError(
                    f"{folder / CONFIG_FILE}: library path {layers} is not a set of {depth} layers with 0 and {last}"
                )
