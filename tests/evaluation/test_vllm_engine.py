"""Compares `vllm-buddy eval --engine vllm` with `--engine hf`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.tiny_models import random_artifact
from tests.importance.conftest import model_with_tokenizer, text_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # an engine is started for each of four policies

__all__ = ["model_with_tokenizer", "text_file"]

QUESTIONS = [
    {"goal": f"Question {i}", "sol1": "Do this, then that.", "sol2": "Do nothing.", "label": i % 2} for i in range(6)
]
# Relative: float32 sums in another order, in log-probabilities down to -40; perplexity is their exponential.
TOLERANCE = 2e-3


def _eval(out: Path, *options: str) -> dict[tuple[str, float, str], dict[str, Any]]:
    """Run an evaluation in its own process, because all engines of a process end together."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, "-m", "vllm_buddy", "eval", "--json", str(out), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {(row["policy"], row["budget"], row["metric"]): row for row in json.loads(out.read_text())}


def test_both_engines_agree(model_with_tokenizer: Path, text_file: Path, tmp_path: Path) -> None:
    """Fails if serving differs from evaluation in paths, bypass, merged weights, or which token is scored."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    random_artifact(tmp_path / "bypass", model_with_tokenizer, bypass_rank=4)
    random_artifact(tmp_path / "lora", model_with_tokenizer, seed=1, lora_rank=2)
    options = [
        *("--model", str(model_with_tokenizer), "--text", str(text_file), "--piqa", str(questions)),
        *("--artifact", str(tmp_path / "bypass"), "--dtype", "float32", "--route-every", "4"),
        *("--policy", f"buddy,reverse,lora={tmp_path / 'lora'}", "--budgets", "1.0,0.75,0.5"),
        *("--window", "64", "--context", "8", "--text-tokens", "300"),
    ]
    hf = _eval(tmp_path / "hf.json", *options)
    served = _eval(tmp_path / "vllm.json", *options, "--engine", "vllm")
    assert {key for key in hf if key[2] != "kl"} == set(served)
    for key, row in served.items():
        expected = hf[key]
        assert (row["layers"], row["n"]) == (expected["layers"], expected["n"])
        assert row["value"] == pytest.approx(expected["value"], rel=TOLERANCE), key
        assert row["stderr"] == pytest.approx(expected["stderr"], rel=10 * TOLERANCE), key
    values = {key[:2]: row["value"] for key, row in served.items() if key[2] == "perplexity"}
    assert len({round(value) for key, value in values.items() if key[1] == 0.5}) == 3
