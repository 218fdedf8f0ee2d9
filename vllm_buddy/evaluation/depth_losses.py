"""Measures the loss of each request's answer at every depth, teacher-forced, on the path that the router chooses.

The Budget Predictor is trained on these losses and evaluated with them. A depth's loss does not depend on the
predictor, so each loss is measured once. All depths of a sample go through the model together and share the layers that
their paths have in common at the start.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.artifact import Artifact
from vllm_buddy.artifact.fingerprint import model_digest
from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation.sample import Sample
from vllm_buddy.method import RequestRoute
from vllm_buddy.method.forked import forked_hidden

_HEAD_ROWS = 256  # hidden states whose logits are in memory at once
_SAVE_EVERY = 50  # samples between two writes to the cache


@dataclass(frozen=True)
class DepthLosses:
    """losses: [num_samples, len(depths)], float64, mean nats per scored token of each sample. depths: ascending."""

    samples: Sequence[Sample]
    depths: tuple[int, ...]
    losses: np.ndarray


def measure_depth_losses(
    model: nn.Module,
    artifact: Artifact,
    samples: Sequence[Sample],
    depths: Sequence[int],
    report: Callable[[int, int], None],
    cache: Path | None = None,
) -> DepthLosses:
    """Measure the loss of every sample at every depth. A sample keeps the path that its context decides.

    model: a Hugging Face causal language model without the artifact's LoRA.
    report: called with (number of samples done, number of all samples).
    cache: folder where losses are saved, and where earlier ones are found.

    Raises:
        EvaluationError: the artifact changes base weights, a loss is not finite, or the cache cannot be used.
    """
    if artifact.lora is not None:
        raise EvaluationError(
            f"artifact '{artifact.config.name}' changes the base weights; a Budget Predictor needs an artifact with a "
            "bypass or without repair"
        )
    depths = tuple(sorted(depths))
    losses = np.full((len(samples), len(depths)), np.nan)
    path = None if cache is None else cache / f"losses-{_digest(model, artifact, samples, depths)}.npy"
    if path is not None and path.is_file():
        losses = _load(path, losses.shape)
    router, schedule = artifact.router(), artifact.schedule(0)
    for index, sample in enumerate(samples):
        if np.isnan(losses[index]).any():
            routes = [RequestRoute(router, schedule, d, sample.inputs, sample.num_context) for d in depths]
            losses[index] = _losses(model, artifact, sample, [route.first_path for route in routes])
            if not np.isfinite(losses[index]).all():
                raise EvaluationError(f"the losses of a sample are {losses[index]}; model or artifact may be damaged")
            if path is not None and (index % _SAVE_EVERY == 0 or index + 1 == len(samples)):
                _save(path, losses)
        report(index + 1, len(samples))
    return DepthLosses(samples, depths, losses)


@torch.no_grad()
def _losses(model: Any, artifact: Artifact, sample: Sample, paths: Sequence[int]) -> np.ndarray:
    device = next(model.parameters()).device
    token_ids = torch.tensor(list(sample.inputs), device=device)
    hidden = forked_hidden(model, token_ids, paths, artifact.bypass)[:, sample.num_context - 1 :]
    targets = torch.tensor(list(sample.targets), device=device).repeat(len(paths))
    losses = []
    for rows, wanted in zip(hidden.flatten(0, 1).split(_HEAD_ROWS), targets.split(_HEAD_ROWS)):
        logits = nn.functional.linear(model.model.norm(rows), model.lm_head.weight).float()
        losses.append(nn.functional.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(losses).view(len(paths), -1).double().mean(dim=1).cpu().numpy()


def _digest(model: Any, artifact: Artifact, samples: Sequence[Sample], depths: Sequence[int]) -> str:
    # Without the predictor, which has no influence on these losses.
    digest = hashlib.sha256(f"{artifact.without_predictor().digest} {model_digest(model)} {depths}".encode())
    for sample in samples:
        digest.update(f"{sample.num_context} {list(sample.token_ids)}".encode())
    return digest.hexdigest()[:16]


def _load(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise EvaluationError(f"{path} cannot be read ({error}); remove it to measure again") from None
    if found.shape != shape:
        raise EvaluationError(f"{path} holds {found.shape} losses, not {shape}; remove it to measure again")
    return found


def _save(path: Path, losses: np.ndarray) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, losses)
        partial.replace(path)
    except OSError as error:
        raise EvaluationError(f"cannot write {path}: {error.strerror or error}") from None
