"""A tiny model with an artifact, the reference's scores of a sample, and options of `vllm-buddy eval`."""

import json
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

WINDOWS = ["--window", "32", "--context", "8", "--text-tokens", "200"]
QUESTIONS = [
    {"goal": f"Question {i}", "sol1": "Do this, then that.", "sol2": "Do nothing.", "label": i % 2} for i in range(6)
]


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


@pytest.fixture(scope="module")
def artifact(model_with_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    random_artifact(folder, model_with_tokenizer, bypass_rank=4)
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


@pytest.fixture
def data(text_file: Path, questions: Path, model_with_tokenizer: Path, artifact: Path) -> list[str]:
    """Options of an evaluation: both kinds of data, the model and the artifact."""
    files = ["--text", str(text_file), "--piqa", str(questions)]
    return [*files, "--model", str(model_with_tokenizer), "--artifact", str(artifact), *WINDOWS, "--dtype", "float32"]
