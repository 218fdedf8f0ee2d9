"""Builds an untrained artifact, whose paths follow the prior alone, from a model folder and a calibration text."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from vllm_buddy.artifact import Artifact
from vllm_buddy.artifact.config import FORMAT_VERSION, BuddyConfig, PriorConfig
from vllm_buddy.artifact.files import one_line
from vllm_buddy.artifact.fingerprint import identify
from vllm_buddy.errors import CalibrationError
from vllm_buddy.importance.base import INDICATORS, find_indicator
from vllm_buddy.importance.calibration import CalibrationText
from vllm_buddy.importance.library import nested_library
from vllm_buddy.importance.normalise import normalise
from vllm_buddy.importance.perplexity import perplexity_by_budget
from vllm_buddy.importance.prior_settings import PriorSettings
from vllm_buddy.models.folder import load_model, load_tokenizer
from vllm_buddy.models.torch_device import find_device, torch_dtype

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PriorResult:
    """The result of `build_prior`.

    perplexity: by indicator, then by budget; empty if no text was held out. text: the calibration text.
    """

    artifact: Artifact
    perplexity: dict[str, dict[float, float]]
    text: CalibrationText


def build_prior(settings: PriorSettings, model_dir: Path, report: Report = lambda *_: None) -> PriorResult:
    """Measure the importance of a model's middle layers and return it as an artifact. Nothing is written.

    model_dir: the folder of the model that the settings name.
    report: called as report(indicator, done, total) during the measurement.

    Raises:
        CalibrationError: the indicator is unknown, or the text cannot be used.
        UnsupportedError: the model is not a dense Llama, Mistral, Qwen2 or Qwen3, or is quantised.
        ArtifactError, ModelError: the folder holds no model, or one that cannot be loaded, or there is no such device.
    """
    find_indicator(settings.indicator)
    if settings.compare and not settings.heldout:
        raise CalibrationError("a comparison of indicators needs held-out text to compare on; give --heldout N as well")
    text = CalibrationText.read(settings.text)
    base = identify(model_dir, settings.base_model_id)
    try:
        config = BuddyConfig(
            format_version=FORMAT_VERSION,
            name=settings.name or settings.out.absolute().name,
            base_model=base,
            prior=PriorConfig(indicator=settings.indicator, calibration=text.name, num_tokens=0),
            has_decision_module=False,
        )
    except ValidationError as error:
        raise CalibrationError(f"these settings describe no artifact: {one_line(error)}") from None
    model = load_model(model_dir, torch_dtype(settings.dtype), find_device(settings.device))
    tokenizer = load_tokenizer(model_dir)
    windows, heldout = text.windows(tokenizer, settings.window, settings.tokens, settings.heldout)
    names = [settings.indicator]
    if settings.compare:
        names += [name for name in INDICATORS if name != settings.indicator]
    priors: dict[str, np.ndarray] = {}
    for name in names:
        indicator = find_indicator(name)
        raw = indicator.measure(model, windows, partial(report, name))
        priors[name] = normalise(raw, log_scale=indicator.log_scale)
    perplexity = perplexity_by_budget(model, heldout, priors) if len(heldout) else {}
    prior = priors[settings.indicator]
    measured = {
        "prior": config.prior.model_copy(update={"num_tokens": windows.numel()}),
        "library": nested_library(prior, settings.library) if settings.library else None,
    }
    return PriorResult(Artifact(config.model_copy(update=measured), prior), perplexity, text)
