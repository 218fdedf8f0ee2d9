"""A tiny model with a tokenizer, text, and the settings of a training run that takes a second."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.importance.conftest import model_with_tokenizer
from vllm_buddy.artifact import Artifact
from vllm_buddy.training.loop import TrainingRun
from vllm_buddy.training.stage1 import run_stage1
from vllm_buddy.training.stage1_settings import Stage1Settings

__all__ = ["model_with_tokenizer"]

# `accelerate launch --cpu --num_processes 2` starts one process, unless it has a host file for mpirun.
TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ON_CPU = {"ACCELERATE_USE_CPU": "true"}  # without it, each of them would believe that it is alone

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "old",
    "wizards",
    "box",
    "with",
    "daft",
    "zombies",
    "in",
    "june",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A text of some thousand tokens (bytes) that varies."""
    path = tmp_path / "data.txt"
    path.write_text(" ".join(f"{WORDS[i * i % 17]} {WORDS[i * 7 % 19]}" for i in range(400)))
    return path


@pytest.fixture
def settings(tmp_path: Path, data: Path, model_with_tokenizer: Path) -> dict[str, Any]:
    """Settings of a run of 6 steps."""
    return {
        "out": tmp_path / "run",
        "data": [{"file": data}],
        "model": model_with_tokenizer,
        "rank": 4,
        "length": 32,
        "batch": 4,
        "tokens": 6 * 4 * 32,
        "init_tokens": 256,
        "search_tokens": 128,
        "top_logits": 8,
        "dtype": "float32",
        "warmup_steps": 2,
        "save_every": 2,
    }


def run(settings: dict[str, Any], stop_after: int | None = None) -> tuple[Artifact, TrainingRun, list[float]]:
    """Train; returns (artifact, run, losses). stop_after: raise KeyboardInterrupt after this many steps."""
    losses: list[float] = []

    def report(row: dict[str, Any]) -> None:
        losses.append(row["loss"])
        if stop_after == len(losses):
            raise KeyboardInterrupt

    checked = Stage1Settings(**settings)
    artifact, stage = run_stage1(checked, settings["model"], report, lambda line: None)
    return artifact, stage, losses
