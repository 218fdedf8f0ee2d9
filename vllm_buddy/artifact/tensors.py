"""Converts an artifact's arrays to the named tensors of `model.safetensors`, and checks them when they are read.

| tensor | shape and type |
|---|---|
| `prior` | [num_middle], float32 |
| `decision.table_context`, `decision.table_newest` | [vocab_size, r], int8 |
| `decision.table_context_scale`, `decision.table_newest_scale` | [r], float32, one per column |
| `decision.b1`, `decision.w2`, `decision.b2` | [r], [num_middle, r], [num_middle], float32 |
| `predictor.*` | as `decision.*`, with one output per step of the predictor's grid instead of num_middle |
| `token.*` | as `decision.*`, with one output per step between the nested paths of schedule `token` |
| `bypass.down`, `bypass.up` | [num_middle, rank, hidden_size], [num_middle, hidden_size, rank], int8 |
| `bypass.down_scale`, `bypass.up_scale` | [num_middle * rank], [num_middle * hidden_size], float32, one per row |
| `drafts.down`, `drafts.up` | as those of `bypass`, the adapters of the exits in place of the bypasses of the layers |
| `drafts.bypass.down`, `drafts.bypass.up` | the same, of the bypasses of the gaps of all exits, one after the other |
| `drafts.vocabulary` | [vocab_size], int8, 1 for each token that drafts choose among and else 0 |
| `lora.NAME.a`, `lora.NAME.b` | [rank, in], [out, rank], float16; NAME is Hugging Face's, without `.weight` |

num_middle is num_layers - 2. Weights are stored as int8 only if that loses no bit. Otherwise a tensor has no scale:
tables are then float32 (as all tables of format version 1 are), and bypasses and adapters are float16.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_buddy.artifact.config import BuddyConfig, DraftConfig
from vllm_buddy.artifact.files import TensorHeader
from vllm_buddy.errors import ArtifactError, shown
from vllm_buddy.method import DraftExit, ExitAdapter, FoldedDecision, FoldedPredictor, TokenRouter, path_of
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.byte_grid import byte_grid
from vllm_buddy.method.lora import LoraDeltas
from vllm_buddy.method.path import gap_starts, gaps_of

_DECISION, _PREDICTOR, _TOKEN = "decision", "predictor", "token"
_TABLES = ("table_context", "table_newest")
_DECISION_TENSORS = (*_TABLES, "b1", "w2", "b2")
_BYPASS, _DRAFTS, _GAPS = "bypass", "drafts", "drafts.bypass"
_LOW_RANK_TENSORS = ("down", "up")
_VOCABULARY = "drafts.vocabulary"
_LORA_TENSORS = ("a", "b")

_MODULE = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)  # Hugging Face's name of a module

# Tensors, or their headers: both have a type and a shape.
_Headers = Mapping[str, TensorHeader] | Mapping[str, np.ndarray]
# None: any length.
_Shapes = dict[str, tuple[int | None, ...]]


@dataclass(frozen=True)
class ArtifactParts:
    """The parts of an artifact that are stored as tensors.

    prior: [num_layers - 2]. bypass, lora, drafts: float32 when read from tensors. draft_vocabulary: see Artifact.
    """

    prior: np.ndarray
    decision: FoldedDecision | None
    bypass: Bypass | None
    lora: LoraDeltas | None
    predictor: FoldedPredictor | None
    token: TokenRouter | None = None
    drafts: tuple[DraftExit, ...] = ()
    draft_vocabulary: np.ndarray | None = None

    @property
    def constants(self) -> tuple[Any, ...]:
        """The values that are stored in the configuration.

        bypass_eps, lora.alpha, predictor.depths, path, eps and gaps of each exit of drafts, and the size of their
        vocabulary.
        """
        return (
            None if self.bypass is None else self.bypass.eps,
            None if self.lora is None else self.lora.alpha,
            None if self.predictor is None else self.predictor.depths,
            tuple((d.path, d.adapter.eps, d.bypass and (d.bypass.eps, d.bypass.layers)) for d in self.drafts),
            None if self.draft_vocabulary is None else len(self.draft_vocabulary),
        )


def pack_tensors(parts: ArtifactParts, vocab_size: int) -> dict[str, np.ndarray]:
    """Return the named tensors that store `parts`. vocab_size: of the base model."""
    tensors = {"prior": parts.prior.astype(np.float32)}
    predictor = None if parts.predictor is None else parts.predictor.decision
    token = None if parts.token is None else parts.token.predictor.decision
    for part, folded in ((_DECISION, parts.decision), (_PREDICTOR, predictor), (_TOKEN, token)):
        for name in () if folded is None else _DECISION_TENSORS:
            array = getattr(folded, name)
            tensors |= _in_bytes(f"{part}.{name}", array, array) if name in _TABLES else {f"{part}.{name}": array}
    for name in _LOW_RANK_TENSORS:
        if parts.bypass is not None:
            tensors |= _pack_low_rank(f"{_BYPASS}.{name}", _values(getattr(parts.bypass, name)))
        if parts.drafts:
            adapters = np.stack([_values(getattr(draft.adapter, name)) for draft in parts.drafts])
            tensors |= _pack_low_rank(f"{_DRAFTS}.{name}", adapters)
        if gaps := [_values(getattr(draft.bypass, name)) for draft in parts.drafts if draft.bypass is not None]:
            tensors |= _pack_low_rank(f"{_GAPS}.{name}", np.concatenate(gaps))
    if parts.draft_vocabulary is not None:
        tensors[_VOCABULARY] = np.zeros(vocab_size, np.int8)
        tensors[_VOCABULARY][parts.draft_vocabulary] = 1
    if parts.lora is not None:
        for part in _LORA_TENSORS:
            tensors |= {f"lora.{name}.{part}": _half(_values(t)) for name, t in getattr(parts.lora, part).items()}
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def check_headers(config: BuddyConfig, headers: Mapping[str, TensorHeader], source: str) -> None:
    """Check names, types and shapes of tensors against `config`, before they are read.

    Raises:
        ArtifactError: a tensor is missing, not described by `config`, or of another type or shape.
    """
    _check_headers(headers, _expected_shapes(config, headers, _lora_names(config, headers, source)), config, source)


def parse_tensors(config: BuddyConfig, tensors: dict[str, np.ndarray], source: str) -> ArtifactParts:
    """Check `tensors` against `config` and return the parts that they store.

    source: where the tensors come from, for error messages.

    Raises:
        ArtifactError: a tensor is missing, not described by `config`, of another shape or not finite.
    """
    lora_names = _lora_names(config, tensors, source)
    _check_headers(tensors, _expected_shapes(config, tensors, lora_names), config, source)
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise ArtifactError(f"{source}: tensor '{name}' holds values that are not finite")
    decision = bypass = lora = predictor = token = None
    if config.has_decision_module:
        decision = _decision(_DECISION, tensors, source)
    if config.predictor is not None:
        folded = _decision(_PREDICTOR, tensors, source)
        predictor = FoldedPredictor(folded, config.predictor.depths, config.base_model.num_layers)
    if config.token is not None:
        paths = tuple(path_of(layers) for layers in config.token.paths)
        depths = tuple(path.bit_count() for path in paths)
        excess = FoldedPredictor(_decision(_TOKEN, tensors, source), depths, config.base_model.num_layers)
        prices = tuple((point.budget, point.price) for point in config.token.prices)
        token = TokenRouter(excess, paths, prices, config.token.decay)
    if config.bypass_rank:
        bypass = Bypass(*_low_rank(_BYPASS, tensors, source), config.bypass_eps)
    drafts: tuple[DraftExit, ...] = ()
    vocabulary = None
    if config.drafts is not None:
        drafts = tuple(_exits(config.drafts, tensors, source))
        if config.drafts.vocabulary is not None:
            vocabulary = np.flatnonzero(tensors[_VOCABULARY])
            if len(vocabulary) != config.drafts.vocabulary:
                raise ArtifactError(
                    f"{source}: drafts choose among {len(vocabulary)} tokens by tensor '{_VOCABULARY}', among "
                    f"{config.drafts.vocabulary} by the configuration"
                )
    if config.lora is not None:
        a, b = ({name: _float32(tensors[f"lora.{name}.{part}"]) for name in lora_names} for part in _LORA_TENSORS)
        lora = LoraDeltas(a, b, config.lora.alpha)
    prior = tensors["prior"].astype(np.float32)
    return ArtifactParts(prior, decision, bypass, lora, predictor, token, drafts, vocabulary)


def _lora_names(config: BuddyConfig, tensors: _Headers, source: str) -> list[str]:
    """The names of the modules that the artifact's LoRA changes, sorted."""
    if config.lora is None:
        return []
    names = sorted({name[5:-2] for name in tensors if name.startswith("lora.") and name.endswith((".a", ".b"))})
    if not names:
        raise ArtifactError(f"{source}: the configuration has a LoRA, of which there is no tensor")
    for name in names:
        if not _MODULE.fullmatch(name):
            raise ArtifactError(f"{source}: {shown(name)} is not the name of a module, whose weight a LoRA changes")
    return names


def _expected_shapes(config: BuddyConfig, tensors: _Headers, lora_names: list[str]) -> _Shapes:
    base = config.base_model
    num_middle = base.num_layers - 2
    shapes: _Shapes = {"prior": (num_middle,)}
    if config.has_decision_module:
        shapes |= _decision_shapes(_DECISION, base.vocab_size, num_middle, tensors)
    if config.predictor is not None:
        shapes |= _decision_shapes(_PREDICTOR, base.vocab_size, len(config.predictor.depths) - 1, tensors)
    if config.token is not None:
        shapes |= _decision_shapes(_TOKEN, base.vocab_size, len(config.token.paths) - 1, tensors)
    if config.bypass_rank:
        shapes |= _low_rank_shapes(_BYPASS, num_middle, config.bypass_rank, base.hidden_size, tensors)
    if config.drafts is not None:
        num_exits = len(config.drafts.exits)
        shapes |= _low_rank_shapes(_DRAFTS, num_exits, config.drafts.rank, base.hidden_size, tensors)
        if config.drafts.gaps:
            num_gaps = sum(len(gaps_of(path_of(layers))) for layers in config.drafts.exits)
            shapes |= _low_rank_shapes(_GAPS, num_gaps, config.drafts.rank, base.hidden_size, tensors)
        shapes |= {} if config.drafts.vocabulary is None else {_VOCABULARY: (base.vocab_size,)}
    if config.lora is not None:
        for name in lora_names:
            shapes |= {f"lora.{name}.a": (config.lora.rank, None), f"lora.{name}.b": (None, config.lora.rank)}
    return shapes


def _decision_shapes(part: str, vocab_size: int, num_outputs: int, tensors: _Headers) -> _Shapes:
    shapes: _Shapes = {f"{part}.{name}": (vocab_size, None) for name in _TABLES}
    scales = [name for name in shapes if name in tensors and tensors[name].dtype == np.int8]
    shapes |= {f"{name}_scale": (None,) for name in scales}
    return shapes | {f"{part}.b1": (None,), f"{part}.w2": (num_outputs, None), f"{part}.b2": (num_outputs,)}


def _low_rank_shapes(part: str, count: int, rank: int, hidden_size: int, tensors: _Headers) -> _Shapes:
    shapes: _Shapes = {f"{part}.down": (count, rank, hidden_size), f"{part}.up": (count, hidden_size, rank)}
    for name in tuple(shapes):
        if name in tensors and tensors[name].dtype == np.int8:
            shapes[f"{name}_scale"] = (math.prod(tensors[name].shape[:2]),)
    return shapes


def _check_headers(tensors: _Headers, shapes: _Shapes, config: BuddyConfig, source: str) -> None:
    for name, shape in shapes.items():
        found = tensors[name].shape if name in tensors else None
        if found is None or len(found) != len(shape) or any(w not in (None, f) for w, f in zip(shape, found)):
            raise ArtifactError(
                f"{source}: tensor '{name}' has shape {found}, expected {shape} for {config.base_model.summary()}"
            )
        if tensors[name].dtype == np.int8 and f"{name}_scale" not in shapes and name != _VOCABULARY:
            raise ArtifactError(f"{source}: tensor '{name}' is of bytes, which only tables, bypasses and adapters are")
    if unknown := tensors.keys() - shapes.keys():
        raise ArtifactError(f"{source}: the configuration says nothing of tensor {shown(min(unknown))}")


def _decision(part: str, tensors: dict[str, np.ndarray], source: str) -> FoldedDecision:
    parts = {name: tensors[f"{part}.{name}"].astype(np.float32) for name in _DECISION_TENSORS}
    widths = {parts[name].shape[-1] for name in (*_TABLES, "b1", "w2")}
    scales = {name: tensors.get(f"{part}.{name}_scale") for name in _TABLES}
    widths |= {len(scale) for scale in scales.values() if scale is not None}
    if len(widths) > 1:
        raise ArtifactError(f"{source}: the tensors {part}.* disagree on their width: {sorted(widths)}")
    for name, scale in scales.items():
        if scale is not None:
            parts[name] = _scaled(parts[name], scale, f"{part}.{name}", source)
    return FoldedDecision(**parts)


def _exits(config: DraftConfig, tensors: dict[str, np.ndarray], source: str) -> Iterator[DraftExit]:
    downs, ups = _low_rank(_GAPS, tensors, source) if config.gaps else (None, None)
    first = 0
    for layers, down, up in zip(config.exits, *_low_rank(_DRAFTS, tensors, source), strict=True):
        path, bypass = path_of(layers), None
        if downs is not None and ups is not None:
            starts = gap_starts(path)
            own = slice(first, first + len(starts))
            bypass = Bypass(downs[own], ups[own], config.eps, starts)
            first = own.stop
        yield DraftExit(path, ExitAdapter(down, up, config.eps), bypass)


def _scaled(codes: np.ndarray, scale: np.ndarray, name: str, source: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = codes * scale.astype(np.float32)
    if not np.isfinite(values).all():
        raise ArtifactError(f"{source}: the scale of tensor '{name}' is so large that its values are not finite")
    return values


def _in_bytes(name: str, array: np.ndarray, otherwise: np.ndarray) -> dict[str, np.ndarray]:
    """Return `array` [rows, columns] as int8 codes and a scale per column if that loses no bit, else `otherwise`.

    The codes get the shape of `otherwise`, which holds the same values.
    """
    codes, scale = byte_grid(array)
    if not np.array_equal(codes * scale, array):
        return {name: otherwise}
    if otherwise.ndim == 3:
        codes = codes.T.reshape(otherwise.shape)
    return {name: codes, f"{name}_scale": scale}


def _rows_as_columns(weight: np.ndarray) -> np.ndarray:
    """[n, rows, width] -> [width, n * rows]: then every row of every matrix is a column, with its own scale."""
    return weight.reshape(-1, weight.shape[-1]).T


def _pack_low_rank(name: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    return _in_bytes(name, _rows_as_columns(weight), _half(weight))


def _low_rank(part: str, tensors: dict[str, np.ndarray], source: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `down` and `up` of bypasses or adapters."""
    down, up = (_low_rank_weight(tensors, f"{part}.{name}", source) for name in _LOW_RANK_TENSORS)
    return down, up


def _low_rank_weight(tensors: dict[str, np.ndarray], name: str, source: str) -> torch.Tensor:
    weight = tensors[name].astype(np.float32)
    if (scale := tensors.get(f"{name}_scale")) is not None:
        weight = _scaled(weight, scale.reshape(*weight.shape[:2], 1), name, source)
    return torch.from_numpy(weight)


def _values(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's values, float32.

    What is computed with them is left to numpy: a server's configuration may be made in a forked process, where an
    operation of torch on several threads would wait for ever.
    """
    return tensor.detach().cpu().float().numpy()


def _half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def _float32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))
