"""Prunes a model statically and writes it in two forms: a checkpoint for stock vLLM, and an artifact for vllm_buddy."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from vllm_buddy.artifact import Artifact
from vllm_buddy.artifact.config import PriorConfig
from vllm_buddy.artifact.files import one_line
from vllm_buddy.artifact.fingerprint import BaseModelIdentity, identify
from vllm_buddy.baselines.base import MEASURED, static_path
from vllm_buddy.baselines.orders import LayerOrder, OrderFile, Report, find_order, layer_order, measure_order
from vllm_buddy.baselines.pruned_checkpoint import save_pruned_checkpoint
from vllm_buddy.baselines.static_artifact import bare_artifact, static_artifact
from vllm_buddy.baselines.static_settings import PruneSettings
from vllm_buddy.errors import BaselineError
from vllm_buddy.importance import CalibrationText
from vllm_buddy.method import layers_of
from vllm_buddy.method.budget import MIN_DEPTH
from vllm_buddy.models.folder import load_config

ARTIFACT_DIR = "artifact"
CHECKPOINT_DIR = "checkpoint"


@dataclass(frozen=True)
class PrunedModel:
    """The result of `prune`.

    order: middle layers in order of removal. measured: the measurement of the order; None if it follows from positions.
    layers: the layers that are kept. artifact: serves the order at every depth.
    """

    order: list[int]
    measured: LayerOrder | None
    layers: list[int]
    artifact: Artifact

    @property
    def base(self) -> BaseModelIdentity:
        return self.artifact.config.base_model


def prune(
    settings: PruneSettings,
    model_dir: Path,
    report: Report = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
) -> PrunedModel:
    """Decide which layers of the model in `model_dir` are kept. Nothing is written.

    report, note: progress of measuring an order. Only that step loads the model, and it is the last one.

    Raises:
        BuddyError: the model, the number of layers, the order or the text cannot be used.
    """
    text = None if settings.text is None else CalibrationText.read(settings.text)
    files = None if settings.orders is None else [OrderFile.load(settings.orders)]
    base = identify(model_dir, settings.base_model_id)
    load_config(model_dir)
    if not MIN_DEPTH <= settings.layers < base.num_layers:
        raise BaselineError(
            f"{settings.layers} layers cannot be kept of {base.num_layers}; allowed are {MIN_DEPTH} to "
            f"{base.num_layers - 1}, the first and the last included"
        )
    name, unmeasured = settings.out.absolute().name, "none" if text is None else text.name
    try:
        bare_artifact(name, base, PriorConfig(indicator=settings.method, calibration=unmeasured, num_tokens=0))
    except ValidationError as error:
        raise BaselineError(f"these settings describe no artifact: {one_line(error)}") from None
    measured = None
    if text is not None:
        measured = measure_order(settings.method, model_dir, text, settings, report, note)
    elif settings.method in MEASURED:
        advice = "name FILE with --orders, or give a text to measure it on with --text"
        measured = find_order(settings.method, base, files, advice)
    order = measured.layers if measured is not None else layer_order(settings.method, base, seed=settings.seed)
    calibration, num_tokens = ("none", 0) if measured is None else (measured.calibration, measured.num_tokens)
    prior = PriorConfig(indicator=settings.method, calibration=calibration, num_tokens=num_tokens)
    artifact = static_artifact(name, base, order, prior)
    return PrunedModel(order, measured, layers_of(static_path(order, settings.layers)), artifact)


def save_pruned(pruned: PrunedModel, model_dir: Path, out: Path) -> None:
    """Write the checkpoint and the artifact to folders in `out`.

    Raises:
        BaselineError: the model is quantised or incomplete. Nothing is written then.
    """
    save_pruned_checkpoint(model_dir, pruned.layers, out / CHECKPOINT_DIR)
    pruned.artifact.save(out / ARTIFACT_DIR)
