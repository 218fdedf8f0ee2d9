"""Runs stage 2 from settings to artifact: measures the losses of every depth and trains a Budget Predictor on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_buddy.artifact import Artifact, load_artifact
from vllm_buddy.artifact.config import PredictorConfig, PricePoint
from vllm_buddy.artifact.fingerprint import identify
from vllm_buddy.data_file import DataFile
from vllm_buddy.errors import TrainingError
from vllm_buddy.evaluation.cost_quality import Gain, choices, compare
from vllm_buddy.evaluation.depth_losses import measure_depth_losses
from vllm_buddy.evaluation.request_samples import SampleShape, request_samples
from vllm_buddy.evaluation.sample import Sample
from vllm_buddy.method import FoldedPredictor
from vllm_buddy.method.budget import MIN_DEPTH, depth_for_budget
from vllm_buddy.method.decision import value_table
from vllm_buddy.models.folder import load_model, load_tokenizer
from vllm_buddy.models.torch_device import find_device, torch_dtype
from vllm_buddy.training.curves import check_plotting
from vllm_buddy.training.out_folder import check_out
from vllm_buddy.training.predictor_fit import Contexts, fit_predictor
from vllm_buddy.training.stage2_settings import Stage2Settings

PRICE_STEPS = 400  # steps of the price from 0 to max_price; the artifact's own price is one of them
PRICES_LISTED = 9  # at most, in the artifact and its model card


@dataclass(frozen=True)
class Stage2:
    """The result of stage 2: the artifact with its predictor, and figures for the record of the run.

    sha256: hash of each data file, by its name. gain: at the artifact's price, on the held-out samples.
    num_samples: of all files together.
    """

    artifact: Artifact
    sha256: dict[str, str]
    gain: Gain
    num_samples: int


def run_stage2(
    settings: Stage2Settings,
    artifact_dir: Path,
    model_dir: Path,
    report: Callable[[dict[str, Any]], None],
    note: Callable[[str], None],
) -> Stage2:
    """Measure the losses that are not in the cache and train the predictor; the artifact is not saved yet.

    report: called with the log rows of training. note: called with a line of text about each other stage of the work.

    Raises:
        BuddyError: settings, data, artifact or model cannot be used.
    """
    check_plotting()  # the curves are drawn when all is trained
    artifact = load_artifact(artifact_dir).without_predictor()
    artifact.require_base(identify(model_dir), TrainingError)
    base = artifact.config.base_model
    check_out(settings.out, artifact_dir, artifact, Artifact.without_predictor)
    depths = _grid(settings, artifact)
    tokenizer = load_tokenizer(model_dir)
    shape = SampleShape(settings.context, settings.prompt, settings.answer)
    files, samples = {}, []
    for source in settings.data:
        file = DataFile.read(source.file if settings.data_dir is None else settings.data_dir / source.file)
        files[source.file.name] = file.sha256
        count = round(settings.examples * source.weight)
        samples.append(request_samples(file, tokenizer, (0.0, source.share), count, shape, settings.seed))
    model = load_model(model_dir, torch_dtype(settings.dtype))
    model.to(find_device("auto"))
    cache = settings.cache_dir or settings.out
    losses = []
    for source, part in zip(settings.data, samples):
        note(f"measuring the losses of {len(part)} samples of {source.file.name} at {len(depths)} depths")
        measured = measure_depth_losses(model, artifact, part, depths, _every_tenth(note), cache)
        losses.append(measured.losses)
    table = np.concatenate(losses)
    values = value_table(model).cpu()
    flat = [sample for part in samples for sample in part]
    predictor, held_out = fit_predictor(contexts_of(flat, values), table, depths, base.num_layers, settings, report)
    folded = FoldedPredictor.fold(predictor, values, base.num_layers)
    return _finish(settings, artifact, folded, [flat[i] for i in held_out], table[held_out.numpy()], files, len(flat))


def contexts_of(samples: Sequence[Sample], values: torch.Tensor) -> Contexts:
    """Return the predictor's input for each sample. values: [vocab_size, value_dim], see decision.value_table."""
    prompts = [torch.tensor(list(sample.token_ids[: sample.num_context])) for sample in samples]
    return Contexts(torch.stack([values[ids].mean(dim=0) for ids in prompts]), values[[int(p[-1]) for p in prompts]])


def _grid(settings: Stage2Settings, artifact: Artifact) -> tuple[int, ...]:
    num_layers, trained = artifact.config.base_model.num_layers, artifact.config.budgets
    smallest = MIN_DEPTH if trained is None else depth_for_budget(trained[0], num_layers)
    if settings.depths == "every":
        return tuple(range(smallest, num_layers + 1))
    if settings.depths[0] < MIN_DEPTH or settings.depths[-1] > num_layers:
        raise TrainingError(f"depths {settings.depths} must lie in {MIN_DEPTH} to {num_layers}, the model's layers")
    return settings.depths


def _finish(
    settings: Stage2Settings,
    artifact: Artifact,
    folded: FoldedPredictor,
    held_out: Sequence[Sample],
    losses: np.ndarray,
    sha256: dict[str, str],
    num_samples: int,
) -> Stage2:
    """Add the predictor and its prices to the artifact, with the mean budget of each price on the held-out samples."""
    num_layers = artifact.config.base_model.num_layers
    excess = np.stack([folded.excess(sample.token_ids[: sample.num_context]) for sample in held_out])
    prices = np.linspace(0, settings.max_price, PRICE_STEPS + 1)
    chosen = [choices(excess, folded.depths, num_layers, price) for price in prices]
    budgets = np.array([np.asarray(folded.depths)[c].mean() / num_layers for c in chosen])
    own = int(np.abs(budgets - settings.mean_budget).argmin())
    listed = np.linspace(budgets.max(), budgets.min(), PRICES_LISTED)
    points = sorted({int(np.abs(budgets - budget).argmin()) for budget in listed})
    config = PredictorConfig(
        depths=folded.depths,
        price=round(float(prices[own]), 4),
        prices=tuple(PricePoint(price=round(float(prices[i]), 4), budget=round(float(budgets[i]), 4)) for i in points),
    )
    gain = compare(losses, folded.depths, chosen[own])
    whole = replace(artifact, config=artifact.config.model_copy(update={"predictor": config}), predictor=folded)
    return Stage2(whole, sha256, gain, num_samples)


def _every_tenth(note: Callable[[str], None]) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if done % max(1, total // 10) == 0:
            note(f"  {done} of {total}")

    return report
