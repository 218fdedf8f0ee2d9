"""Measures budget `auto` on data sets, and compares it with constant budgets and the best choice in hindsight."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_buddy.artifact import Artifact, load_artifact, resolve_artifact
from vllm_buddy.artifact.fingerprint import identify
from vllm_buddy.artifact.provenance import PREDICTOR_KEY, trained_share
from vllm_buddy.data_file import DataFile
from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation.cost_quality import Gain, Hindsight, choices, compare
from vllm_buddy.evaluation.depth_losses import DepthLosses, measure_depth_losses
from vllm_buddy.evaluation.eval_budget_settings import EvalBudgetSettings
from vllm_buddy.evaluation.request_samples import SampleShape, request_samples
from vllm_buddy.models.folder import load_model, load_tokenizer
from vllm_buddy.models.torch_device import find_device, torch_dtype

MIXED = "mixed"  # the name of all data sets together
PRICE_STEPS = 100
LARGEST_PRICE = 4.0  # nats per token, or more if the artifact lists more
BEST_POINTS = 24


@dataclass(frozen=True)
class AutoEvaluation:
    """The rows of the results file. Losses are means over samples, in nats per scored token.

    A row's `series` is one of:
    constant: a data set at one depth.
    best: a data set with the best choice in hindsight, at some mean number of layers.
    auto: a data set at one price. `depths` counts the samples of each chosen depth; `own_price` marks the artifact's
    own price.
    """

    rows: list[dict[str, Any]]

    @property
    def data_sets(self) -> list[str]:
        """Names of the data sets, in order. If there are several, the last is all of them together."""
        return list(dict.fromkeys(row["data_set"] for row in self.rows))

    def of(self, series: str, data_set: str) -> list[dict[str, Any]]:
        """Return the rows of one series of one data set."""
        return [row for row in self.rows if row["series"] == series and row["data_set"] == data_set]

    def nearest(self, data_set: str, layers: float) -> dict[str, Any]:
        """Return the row of `auto` whose mean number of layers is nearest to `layers`."""
        return min(self.of("auto", data_set), key=lambda row: abs(row["layers"] - layers))

    def at_own_price(self, data_set: str) -> dict[str, Any]:
        """Return the row of `auto` at the artifact's own price."""
        return next(row for row in self.of("auto", data_set) if row["own_price"])


def evaluate_auto(
    settings: EvalBudgetSettings,
    model_dir: Path,
    report: Callable[[str, int, int], None],
    note: Callable[[str], None] = lambda _: None,
) -> AutoEvaluation:
    """Measure every data set at every depth that the predictor chooses from, then let the predictor choose.

    report: called with (data set, number of samples done, number of all samples). note: called with a line of text
    about each data set that the artifact was trained on.

    Raises:
        BuddyError: data, artifact or model cannot be used, or the artifact has no Budget Predictor.
    """
    base = identify(model_dir)
    folder = resolve_artifact(settings.artifact, lambda: base)
    artifact = load_artifact(folder)
    if artifact.predictor is None:
        raise EvaluationError(
            f"artifact '{artifact.config.name}' has no Budget Predictor; `vllm-buddy train-budget` makes one"
        )
    artifact.require_base(base, EvaluationError)
    names = [path.name for path in settings.data]
    for name in names:
        if names.count(name) > 1:
            raise EvaluationError(f"two data sets are called {name}")
    tokenizer = load_tokenizer(model_dir)
    shape = SampleShape(settings.context, settings.prompt, settings.answer)
    files = {path.name: DataFile.read(path) for path in settings.data}
    for name, file in files.items():
        share = max(trained_share(folder, file.sha256, part) for part in (None, PREDICTOR_KEY))
        if settings.part[0] < share:
            note(
                f"warning: artifact '{artifact.config.name}' was trained on the first {share:.0%} of {name}, and "
                f"--part {settings.part[0]:g},{settings.part[1]:g} evaluates it on some of that"
            )
    samples = {
        name: request_samples(file, tokenizer, settings.part, settings.examples, shape, settings.seed)
        for name, file in files.items()
    }
    model = load_model(model_dir, torch_dtype(settings.dtype))
    model.to(find_device("auto"))
    measured = {}
    for name, part in samples.items():

        def progress(done: int, total: int, name: str = name) -> None:
            report(name, done, total)

        measured[name] = measure_depth_losses(
            model, artifact, part, artifact.predictor.depths, progress, settings.cache_dir
        )
    return compare_auto(artifact, measured)


def compare_auto(artifact: Artifact, measured: Mapping[str, DepthLosses]) -> AutoEvaluation:
    """Compute the rows from losses that were measured at the depths of the artifact's predictor."""
    predictor, config = artifact.predictor, artifact.config.predictor
    assert predictor is not None
    assert config is not None
    losses = {name: part.losses for name, part in measured.items()}
    excess = {
        name: np.stack([predictor.excess(s.token_ids[: s.num_context]) for s in part.samples])
        for name, part in measured.items()
    }
    if len(measured) > 1:
        losses[MIXED], excess[MIXED] = (np.concatenate(list(parts.values())) for parts in (losses, excess))
    depths, own = predictor.depths, config.price
    top = max(LARGEST_PRICE, *(point.price for point in config.prices), own)
    prices = sorted({*np.linspace(0, top, PRICE_STEPS + 1).round(4).tolist(), own})
    rows: list[dict[str, Any]] = []
    for name, table in losses.items():
        about = {"data_set": name, "samples": len(table)}
        for depth, loss in zip(depths, table.mean(axis=0)):
            rows.append({"series": "constant", **about, "layers": depth, "loss": loss})
        best = Hindsight.of(table, depths)
        for layers in np.linspace(depths[0], depths[-1], BEST_POINTS):
            rows.append({"series": "best", **about, "layers": layers, "loss": best.loss(layers)})
        for price in prices:
            chosen = choices(excess[name], depths, predictor.num_layers, price)
            rows.append({"series": "auto", **about, "price": price, "own_price": price == own})
            rows[-1] |= _found(compare(table, depths, chosen, best), depths, chosen)
    return AutoEvaluation([{key: _rounded(value) for key, value in row.items()} for row in rows])


def _found(found: Gain, depths: Sequence[int], chosen: np.ndarray) -> dict[str, Any]:
    counts = np.bincount(chosen, minlength=len(depths))
    share = None if math.isnan(found.share_of_best) else found.share_of_best
    return {
        **asdict(found),
        "gain": found.gain,
        "share_of_best": share,
        "depths": {str(depth): int(count) for depth, count in zip(depths, counts) if count},
    }


def _rounded(value: Any) -> Any:
    return round(float(value), 5) if isinstance(value, float) else value
