"""The artifact, in memory and on disk: what training writes and serving loads.

On disk it is a Hugging Face folder of four files: `buddy_config.json` (schema: `config.py`), `model.safetensors`
(prior, folded Decision Module, bypass or LoRA, folded Budget Predictor, adapters of draft exits; layout: `tensors.py`),
`README.md` (the model card) and `run.yaml` (how the artifact was made). This module reads and writes the first two.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError
from safetensors.numpy import save

from vllm_buddy.artifact.config import FORMAT_VERSION, BuddyConfig, DraftConfig, PricePoint, TokenConfig
from vllm_buddy.artifact.files import MOST_CONFIG_BYTES, TensorFile, check_size, one_line, read_json, write_files
from vllm_buddy.artifact.fingerprint import BaseModelIdentity
from vllm_buddy.artifact.provenance import CARD_FILE, RUN_FILE
from vllm_buddy.artifact.tensors import ArtifactParts, check_headers, pack_tensors, parse_tensors
from vllm_buddy.errors import ArtifactError, BuddyError, shown
from vllm_buddy.method import (
    DraftExit,
    FoldedDecision,
    FoldedPredictor,
    LayerPath,
    PathSchedule,
    Router,
    TokenRouter,
    layers_of,
    path_of,
    top_k_path,
)
from vllm_buddy.method.budget import MIN_DEPTH
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.lora import LoraDeltas
from vllm_buddy.method.router import standardised

CONFIG_FILE = "buddy_config.json"
WEIGHTS_FILE = "model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, RUN_FILE)

RepairKind = Literal["none", "bypass", "lora"]


@dataclass(frozen=True)
class Artifact:
    """An artifact in memory.

    prior: [num_layers - 2], float32, normalised, larger is more important. bypass, lora: float32 after loading.
    drafts: exits of lossless mode, shallow to deep; empty: none were trained. draft_vocabulary: [n], int64, ascending,
        the tokens that drafts choose among; None: all.
    """

    config: BuddyConfig
    prior: np.ndarray
    decision: FoldedDecision | None = None
    bypass: Bypass | None = None
    lora: LoraDeltas | None = None
    predictor: FoldedPredictor | None = None
    token: TokenRouter | None = None
    drafts: tuple[DraftExit, ...] = ()
    draft_vocabulary: np.ndarray | None = None

    @property
    def repair(self) -> RepairKind:
        """What repairs the output of a model that skips layers.

        bypass: a small network that runs where a layer is skipped. lora: merged into the weights, at no cost. An
        artifact with both counts as bypass.
        """
        if self.bypass is not None:
            return "bypass"
        return "none" if self.lora is None else "lora"

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits that change with everything that can change a path or its results."""
        # Without the format version: an artifact that a later version saves again keeps its digest.
        # Nor does a field that later versions added, and that it does not use, change it.
        unused: dict[str, Any] = {name: True for name in ("token", "drafts") if getattr(self.config, name) is None}
        if self.config.drafts is not None and not self.config.drafts.gaps:
            unused["drafts"] = {"gaps"}
        h = hashlib.sha256(self.config.model_dump_json(exclude={"format_version": True, **unused}).encode())
        for _, array in sorted(self._tensors.items()):
            h.update(np.ascontiguousarray(array).tobytes())
        return h.hexdigest()[:16]

    def require_base(
        self, found: BaseModelIdentity, error: type[BuddyError] = ArtifactError, *, where: str = ""
    ) -> None:
        """Raise `error` unless the artifact was made for the model `found`. where: begins the message."""
        wanted = self.config.base_model
        if not wanted.same_model(found):
            raise error(
                f"{where}artifact '{self.config.name}' was made for {wanted.summary()}, but the model is "
                f"{found.summary()}"
            )

    def without_predictor(self) -> "Artifact":
        """Return this artifact without its Budget Predictor, so that there is no budget `auto`."""
        return replace(self, config=self.config.model_copy(update={"predictor": None}), predictor=None)

    def without_drafts(self) -> "Artifact":
        """Return this artifact without exits of its own for lossless mode, which then drafts with the bypass alone."""
        config = self.config.model_copy(update={"drafts": None})
        return replace(self, config=config, drafts=(), draft_vocabulary=None)

    def router(self, *, library: bool | None = None) -> Router:
        """Return the router of this artifact.

        library: whether to choose only among the paths of the artifact's library. None: yes if the artifact has both a
            library and a Decision Module, which was then trained on the library.

        Raises:
            ArtifactError: `library` is True and the artifact has no library.
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

    def first_path(self, depth: int) -> LayerPath | None:
        """A path of `depth` layers that depends on no input: the first of the library, else the prior's.

        None if the library has none.
        """
        if self.config.library is not None:
            sets = self.config.library.get(depth)
            return path_of(sets[0]) if sets else None
        return top_k_path(standardised(self.prior, self.config.omega), depth)

    def schedule(self, route_every: int | None = None, lag: int = 0) -> PathSchedule:
        """Return the schedule of routing decisions.

        route_every: tokens between two decisions as the user set it; None: the artifact's own number, else the default.
        lag: see PathSchedule.
        """
        interval = route_every if route_every is not None else self.config.route_every
        return PathSchedule(lag=lag) if interval is None else PathSchedule(interval, lag)

    def save(self, folder: Path) -> None:
        """Write `buddy_config.json` and `model.safetensors`.

        Raises:
            ArtifactError: the files could not be loaded again, or cannot be written. Nothing is written, and what was
                there stays.
        """
        config = self.config.model_copy(update={"format_version": FORMAT_VERSION})
        tensors = self._tensors
        check_size((tensor.shape for tensor in tensors.values()), f"artifact '{config.name}'")
        _check_library(config, folder)
        stored = parse_tensors(config, tensors, f"artifact '{config.name}'")
        if stored.constants != self._parts.constants:
            raise ArtifactError(
                f"artifact '{config.name}': bypass_eps, lora.alpha, predictor.depths and drafts of the configuration "
                f"are {stored.constants}, those of the weights are {self._parts.constants}"
            )
        text = _one_line_per_path(config.model_dump_json(indent=2)) + "\n"
        try:
            BuddyConfig.model_validate_json(text)
        except ValidationError as error:
            raise ArtifactError(f"artifact {shown(config.name)} does not fit the schema: {one_line(error)}") from None
        if len(text.encode()) > MOST_CONFIG_BYTES:
            raise ArtifactError(
                f"the configuration of artifact '{config.name}' has more than {MOST_CONFIG_BYTES >> 20} MiB; lower the "
                "number of paths in its library"
            )
        # safetensors' own save_file makes a file that only its owner can read.
        write_files(folder, {WEIGHTS_FILE: save(tensors), CONFIG_FILE: text.encode()})

    @property
    def _parts(self) -> ArtifactParts:
        return ArtifactParts(**{part.name: getattr(self, part.name) for part in fields(ArtifactParts)})

    @property
    def _tensors(self) -> dict[str, np.ndarray]:
        return pack_tensors(self._parts, self.config.base_model.vocab_size)


def with_token_router(artifact: Artifact, router: TokenRouter) -> Artifact:
    """Return the artifact with schedule `token`, whose tokens `router` routes."""
    config = TokenConfig(
        paths=tuple(tuple(layers_of(path)) for path in router.paths),
        prices=tuple(PricePoint(price=price, budget=budget) for budget, price in router.prices),
        decay=router.decay,
    )
    return replace(artifact, config=artifact.config.model_copy(update={"token": config}), token=router)


def with_drafts(artifact: Artifact, exits: Sequence[DraftExit], vocabulary: np.ndarray | None = None) -> Artifact:
    """Return the artifact with exits for lossless mode, shallow to deep, in place of those that it may have.

    exits: their adapters, and the bypasses that all or none have of their gaps, have one rank and one eps.
    vocabulary: as Artifact.draft_vocabulary.
    """
    adapter = exits[0].adapter
    config = DraftConfig(
        exits=tuple(tuple(layers_of(draft.path)) for draft in exits),
        rank=adapter.rank,
        eps=adapter.eps,
        gaps=exits[0].bypass is not None,
        vocabulary=None if vocabulary is None else len(vocabulary),
    )
    changed = artifact.config.model_copy(update={"drafts": config})
    return replace(artifact, config=changed, drafts=tuple(exits), draft_vocabulary=vocabulary)


def load_artifact(folder: Path) -> Artifact:
    """Read an artifact folder. Nothing in it is executed; tensors are read once their shapes have been checked.

    Raises:
        ArtifactError: the artifact is missing, truncated, inconsistent, of a newer format or larger than any. The
            message says in one line what was found and what is expected.
    """
    config = _read_config(folder)
    _check_library(config, folder)
    weights = folder / WEIGHTS_FILE
    file = TensorFile(weights)
    check_headers(config, file.headers, str(weights))
    parts = parse_tensors(config, file.read(), str(weights))
    return Artifact(config, **vars(parts))


def _read_config(folder: Path) -> BuddyConfig:
    path = folder / CONFIG_FILE
    raw = read_json(path)
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {shown(version)}, this vllm_buddy reads up to {FORMAT_VERSION}; update "
            "vllm_buddy"
        )
    try:
        return BuddyConfig.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{path} does not fit the schema: {one_line(error)}") from None


def _one_line_per_path(indented_json: str) -> str:
    """Put each list of numbers on one line: a library holds thousands of numbers, and one per line is unreadable."""
    return re.sub(
        r"\[[\d,\s]+\]", lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), indented_json
    )


def _check_library(config: BuddyConfig, folder: Path) -> None:
    last = config.base_model.num_layers - 1
    for depth, sets in (config.library or {}).items():
        if not MIN_DEPTH <= depth <= last + 1:
            raise ArtifactError(
                f"{folder / CONFIG_FILE}: the library has paths of {shown(depth)} layers, which must be {MIN_DEPTH} to "
                f"{last + 1}"
            )
        if not sets:
            raise ArtifactError(f"{folder / CONFIG_FILE}: the library holds no path of {depth} layers")
        for layers in sets:
            if len(set(layers)) != depth or not {0, last} <= set(layers) or max(layers) > last or min(layers) < 0:
                raise ArtifactError(
                    f"{folder / CONFIG_FILE}: library path {shown(layers)} is not a set of {depth} layers with 0 and "
                    f"{last}"
                )
