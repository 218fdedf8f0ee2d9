"""A tiny model with an artifact, and the reference's scores of a sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.harness.tiny_models import VOCAB_SIZE, load_model, random_artifact, save_tiny_model
from tests.importance.conftest import model_with_tokenizer, text_file
from vllm_buddy.artifact import Artifact
from vllm_buddy.evaluation import Sample
from vllm_buddy.method import PathSchedule, RequestRoute
from vllm_buddy.method.reference import routed_logits

__all__ = ["model_with_tokenizer", "text_file"]


@dataclass(frozen=True)
class Tiny:
    """A random Llama with a random artifact that has a Decision Module, a bypass and a path library."""

    folder: Path
    model: nn.Module
    artifact: Artifact

    def by_hand(
        self, sample: Sample, depth: int, interval: int, kv_policy: str, model: nn.Module | None = None
    ) -> torch.Tensor:
        """Return the reference's log-probabilities of the vocabulary for each target: [num_targets, vocab_size]."""
        route = RequestRoute(
            self.artifact.router(), PathSchedule(interval), depth, sample.token_ids[: sample.num_context]
        )
        inputs = list(sample.token_ids[:-1])
        paths = [run.path for run in route.runs(0, len(inputs), inputs) for _ in range(run.num_tokens)]
        logits = routed_logits(model or self.model, inputs, paths, kv_policy, self.artifact.bypass)
        return logits[sample.num_context - 1 :].log_softmax(dim=-1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("evaluation")
    folder = save_tiny_model(root / "model", "llama")
    return Tiny(folder, load_model(folder), random_artifact(root / "artifact", folder, bypass_rank=4))


@pytest.fixture
def samples() -> list[Sample]:
    """Samples of different lengths, so that batches are padded and reordered."""
    return random_samples([(40, 8), (23, 1), (64, 30), (5, 2), (40, 39)])


def random_samples(sizes: Sequence[tuple[int, int]]) -> list[Sample]:
    """Return random samples. sizes: (number of tokens, number of context tokens) of each."""
    rng = np.random.default_rng(0)
    return [Sample(rng.integers(0, VOCAB_SIZE, n).tolist(), context) for n, context in sizes]
