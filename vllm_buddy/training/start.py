"""The start of stage 1: the initial bypass, and the orders in which layers are removed."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_buddy.artifact import Artifact, load_artifact, resolve_artifact
from vllm_buddy.artifact.fingerprint import BaseModelIdentity
from vllm_buddy.baselines import OrderFile, layer_order, static_path, static_prior
from vllm_buddy.errors import TrainingError
from vllm_buddy.importance.library import nested_library
from vllm_buddy.method import layers_of
from vllm_buddy.method.budget import depth_for_budget
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.training.checkpoint import START_FILE, load_state, save_state
from vllm_buddy.training.corpus import Corpus
from vllm_buddy.training.loop import TrainingRun
from vllm_buddy.training.path_search import removal_order, single_divergences
from vllm_buddy.training.regression import fit_bypass
from vllm_buddy.training.repair import BypassRepair
from vllm_buddy.training.routing import RandomRouting
from vllm_buddy.training.stage1_settings import Stage1Settings
from vllm_buddy.training.teacher import Teacher

SEARCHED, LEARNED = "searched", "learned"
EXPLORE_DIR = "explore"
REGRESSION_FILE = "regression.pt"

Note = Callable[[str], None]


@dataclass(frozen=True)
class Origin:
    """What a run goes out from beside settings and text, and a hash of it: a run is resumed on the same alone.

    order: of `static_order`. artifact: of `start_from`. digest: of both and of the base model's weights.
    """

    order: list[int] | None
    artifact: Artifact | None
    digest: str

    @classmethod
    def of(cls, settings: Stage1Settings, base: BaseModelIdentity, weights: str) -> "Origin":
        """Read it. weights: of `weight_digest`.

        Raises:
            BuddyError: the order has not been measured for this model, or see `starting_artifact`.
        """
        order, artifact = static_order(settings, base), starting_artifact(settings, base)
        parts = json.dumps([weights, order, None if artifact is None else artifact.digest])
        return cls(order, artifact, hashlib.sha256(parts.encode()).hexdigest()[:16])


@dataclass(frozen=True)
class Start:
    """The start of training: the orders in which layers are removed, and the initial bypass.

    order: for all text. by_source: for each source of text; empty unless a Decision Module is fitted to choose paths.
    bypass: None for the recipes that train LoRA. artifact: the one that training starts from (`start_from`).
    """

    order: list[int]
    by_source: list[list[int]]
    bypass: Bypass | None
    artifact: Artifact | None = None

    def library(self, paths_per_depth: int, smallest: int) -> dict[int, list[list[int]]]:
        """Return up to `paths_per_depth` paths for each depth: of `order`, of each source's order, then variants.

        Depths below `smallest` are not trained and get the path of `order` alone.
        """
        if self.artifact is not None:
            assert self.artifact.config.library is not None
            return dict(self.artifact.config.library)
        variants = nested_library(static_prior(self.order), paths_per_depth)
        library = {}
        for depth, nested in variants.items():
            if depth < smallest:
                library[depth] = [layers_of(static_path(self.order, depth))]
                continue
            paths = [layers_of(static_path(order, depth)) for order in (self.order, *self.by_source)]
            unique = dict.fromkeys(map(tuple, (*paths, *nested)))
            library[depth] = [list(path) for path in unique][:paths_per_depth]
        return library


def static_order(settings: Stage1Settings, base: BaseModelIdentity) -> list[int] | None:
    """Return the order in which the settings' static method removes layers; None if the order is searched.

    Raises:
        BaselineError: it has not been measured for this model; the message says how.
    """
    if settings.paths == SEARCHED:
        return None
    files = None if settings.orders is None else [OrderFile.load(settings.orders)]
    return list(layer_order(settings.prior if settings.paths == LEARNED else settings.paths, base, files=files))


def starting_artifact(settings: Stage1Settings, base: BaseModelIdentity) -> Artifact | None:
    """Return the artifact of `start_from`; None where there is none.

    Raises:
        BuddyError: it cannot be read, or training with these settings cannot start from it.
    """
    if settings.start_from is None:
        return None
    artifact = load_artifact(resolve_artifact(settings.start_from, lambda: base))
    _order_of(artifact, base)
    assert artifact.bypass is not None
    if settings.rank != artifact.bypass.rank:
        raise TrainingError(
            f"start_from: the bypass of '{artifact.config.name}' has rank {artifact.bypass.rank}; set rank to that"
        )
    return artifact


def find_start(
    settings: Stage1Settings,
    base: BaseModelIdentity,
    origin: Origin,
    model: nn.Module,
    corpus: Corpus,
    explored: tuple[Stage1Settings, Corpus],
    teacher: Teacher | None,
    accelerator: Any,
    report: Callable[[dict[str, Any]], None],
    note: Note,
) -> Start:
    """Return the start of training: from the run's folder if it is there, else computed and saved there.

    Of several processes, the main one computes what is not trained, and the others read it. Those that share the base
    model's weights compute it together, and all go on from what the main one has saved.
    """
    smallest, order = depth_for_budget(settings.min_budget, base.num_layers), origin.order
    path, digest = settings.out / START_FILE, f"{settings.digest}-{corpus.digest}-{origin.digest}"
    known = _known_start(path, digest)
    accelerator.wait_for_everyone()  # before one of them saves what another has yet to look for
    if known is not None:
        return known
    if (artifact := origin.artifact) is not None:
        return Start(_order_of(artifact, base), [], artifact.bypass, artifact)
    bypass = None
    in_turn = contextlib.nullcontext if settings.shard_base else accelerator.main_process_first
    if settings.recipe == "bypass":
        with in_turn():
            bypass = _starting_bypass(settings, base, model, corpus, digest, accelerator, note)
        bypass = bypass.to(torch.empty(0, device=accelerator.device))
    if settings.explore_tokens:
        assert bypass is not None
        windows = corpus.take(settings.search_tokens // 2)
        note(f"training on random paths for {explored[0].tokens} tokens")
        explored[0].out.mkdir(exist_ok=True)
        repair, routing = BypassRepair(bypass), RandomRouting(single_divergences(model, windows, bypass))
        run = TrainingRun(*explored, model, repair, routing, teacher, accelerator, contextlib.nullcontext, report)
        run.origin = origin.digest
        run.train()
        explored_bypass = repair.bypass()
        bypass = Bypass(explored_bypass.down.detach(), explored_bypass.up.detach(), bypass.eps)
    with in_turn():
        if not settings.shard_base:  # a process that waited for its turn finds what the main one has saved
            known = _known_start(path, digest)
        if known is None:
            known = Start(order, [], bypass) if order else _searched(settings, model, corpus, bypass, smallest, note)
            orders = {"order": known.order, "by_source": known.by_source}
            _save(path, {"digest": digest, **orders, "bypass": _parts(bypass)}, settings, accelerator)
            known = _known_start(path, digest)
    assert known is not None
    return known


def _save(path: Path, state: dict[str, Any], settings: Stage1Settings, accelerator: Any) -> None:
    """Save what the processes computed one after the other, or together."""
    if not settings.shard_base:
        save_state(path, state)
        return
    if accelerator.is_main_process:
        save_state(path, state)
    accelerator.wait_for_everyone()


def _known_start(path: Path, digest: str) -> Start | None:
    if not path.is_file():
        return None
    state = load_state(path)
    if state["digest"] != digest:
        raise TrainingError(
            f"{path.parent} holds a run with other settings, data or weights; name another `out`, or remove the folder"
        )
    return Start(state["order"], state["by_source"], Bypass(**state["bypass"]) if state["bypass"] else None)


def _searched(
    settings: Stage1Settings, model: nn.Module, corpus: Corpus, bypass: Bypass | None, smallest: int, note: Note
) -> Start:
    order = _search(model, corpus.take(settings.search_tokens), bypass, smallest, "all text", note)
    by_source = []
    if settings.router_windows:
        for number, source in enumerate(settings.data):
            windows = corpus.take(settings.search_tokens // 2, number)
            by_source.append(_search(model, windows, bypass, smallest, source.name, note))
    return Start(order, by_source, bypass)


def _search(
    model: nn.Module, windows: torch.Tensor, bypass: Bypass | None, smallest: int, text: str, note: Note
) -> list[int]:
    note(f"searching for paths down to {smallest} layers on {windows.numel()} tokens of {text}")

    def report(layer: int, depth: int, divergence: float) -> None:
        note(f"  {depth} layers: removed layer {layer}, {divergence:.3f} nats per token from the full model")

    return removal_order(model, windows, bypass, smallest, report)


def _starting_bypass(
    settings: Stage1Settings,
    base: BaseModelIdentity,
    model: Any,
    corpus: Corpus,
    digest: str,
    accelerator: Any,
    note: Note,
) -> Bypass:
    """Return the bypass before any training: from the run's folder if it is there, else computed and saved there."""
    hidden_size, middle = model.config.hidden_size, base.num_layers - 2
    if settings.init_tokens == 0:
        down = torch.randn(middle, settings.rank, hidden_size) / hidden_size**0.5
        return Bypass(down, torch.zeros(middle, hidden_size, settings.rank), model.config.rms_norm_eps)
    path = settings.out / REGRESSION_FILE
    if path.is_file() and (state := load_state(path))["digest"] == digest:
        return Bypass(**state["bypass"])
    windows = corpus.take(settings.init_tokens)
    note(f"fitting the bypass of {middle} layers by regression on {windows.numel()} tokens")
    bypass = fit_bypass(model, windows, settings.rank, checkpoint=settings.checkpoint_activations)
    _save(path, {"digest": digest, "bypass": _parts(bypass)}, settings, accelerator)
    return Bypass(**load_state(path)["bypass"])


def _parts(bypass: Bypass | None) -> dict[str, Any] | None:
    return None if bypass is None else {"down": bypass.down, "up": bypass.up, "eps": bypass.eps}


def _order_of(artifact: Artifact, base: BaseModelIdentity) -> list[int]:
    """The order in which the first paths of an artifact's library lose their layers."""
    library = artifact.config.library
    if artifact.bypass is None or not library or not artifact.config.base_model.same_model(base):
        raise TrainingError(
            f"start_from: artifact '{artifact.config.name}' must have a bypass and a path library, and be made for "
            f"{base.summary()}"
        )
    order: list[int] = []
    layers = set(range(base.num_layers))
    for depth in sorted(library, reverse=True):
        gone = layers - set(library[depth][0])
        if len(layers) - len(gone) != depth or len(gone) != 1:
            raise TrainingError(f"start_from: the first paths of '{artifact.config.name}' are not nested")
        order += gone
        layers -= gone
    return [*order, *sorted(layers - {0, base.num_layers - 1})]
