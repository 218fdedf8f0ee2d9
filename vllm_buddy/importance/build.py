"""From a model folder and a text to an artifact whose paths follow the prior alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.artifact import FORMAT_VERSION, Artifact, BuddyConfig, PriorConfig
from vllm_buddy.errors import CalibrationError, UnsupportedError
from vllm_buddy.fingerprint import identify
from vllm_buddy.importance.base import INDICATORS, find_indicator
from vllm_buddy.importance.library import nested_library
from vllm_buddy.importance.normalise import normalise
from vllm_buddy.importance.perplexity import perplexity_by_budget
from vllm_buddy.importance.settings import PriorSettings
from vllm_buddy.importance.text import CalibrationText
from vllm_buddy.method.reference import check_config

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PriorResult:
    """perplexity: by indicator, then budget; empty where nothing was held out. text: what was measured on."""

    artifact: Artifact
    perplexity: dict[str, dict[float, float]]
    text: CalibrationText


def build_prior(settings: PriorSettings, report: Report = lambda what, done, total: None) -> PriorResult:
    """Measure the importance of a model's middle layers and make an artifact of it.

    report: called as report(what, done, total) while measuring.

    Raises:
        CalibrationError: the indicator is unknown, or the text or the tokenizer cannot be used.
        UnsupportedError: the model is not a dense Llama, Qwen2 or Qwen3, or is quantised.
        ArtifactError: the folder holds no model.
    """
    find_indicator(settings.indicator)
    if settings.compare and not settings.heldout:
        raise CalibrationError("a comparison of indicators needs held-out text to compare on; give --heldout N as well")
    text = CalibrationText.read(settings.text)
    base = identify(settings.model_dir, settings.base_model_id)
    model, tokenizer = _load(settings)
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
    config = BuddyConfig(
        format_version=FORMAT_VERSION,
        name=settings.name or settings.out.absolute().name,
        base_model=base,
        prior=PriorConfig(indicator=settings.indicator, calibration=text.name, num_tokens=windows.numel()),
        has_decision_module=False,
        library=nested_library(prior, settings.library) if settings.library else None,
    )
    return PriorResult(Artifact(config, prior), perplexity, text)


def _load(settings: PriorSettings) -> tuple[nn.Module, Any]:
    """Model in fp32, for gradients that do not underflow, and tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(settings.model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{settings.model_dir}: transformers cannot read config.json ({error})") from None
    check_config(config)
    if getattr(config, "quantization_config", None):
        raise UnsupportedError(
            f"{settings.model_dir} is quantised; measure the model it was made from, the artifact fits both"
        )
    # Asked explicitly: without any file transformers makes up an empty tokenizer that finds no tokens.
    if not any((settings.model_dir / name).is_file() for name in _TOKENIZER_FILES):
        raise CalibrationError(
            f"{settings.model_dir} has no tokenizer files; wanted is {' or '.join(_TOKENIZER_FILES)}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{settings.model_dir} has no tokenizer that can be loaded ({error})") from None
    try:
        model = AutoModelForCausalLM.from_pretrained(settings.model_dir, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{settings.model_dir}: transformers cannot load the model ({error})") from None
    return model.eval(), tokenizer
