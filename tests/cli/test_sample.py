"""The command `vllm-buddy sample`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.importance.conftest import model_with_tokenizer
from vllm_buddy.cli import main

__all__ = ["model_with_tokenizer"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jsonl", "--tokens", "0"], "must be positive"),
        (["a.jsonl", "--temperature", "nan"], "must be positive"),
        (["a.jsonl", "--temperature", "inf"], "must be positive"),
        (["a.txt"], "must end in .jsonl"),
        (["none/a.jsonl"], "cannot write"),
    ],
)
def test_bad_input_is_refused_before_vllm_starts(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a wrong option is noticed only after an engine has started, or after sampling."""
    out, *options = arguments
    assert main(["sample", str(tmp_path / out), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_samples_can_be_trained_on(model_with_tokenizer: Path, tmp_path: Path) -> None:
    """Fails if rows are of another form than training reads, or begin otherwise than asked."""
    out = tmp_path / "sampled.jsonl"
    command = [sys.executable, "-m", "vllm_buddy", "sample", str(out), "--model", str(model_with_tokenizer)]
    command += ["--tokens", "100", "--max-tokens", "32", "--batch", "2", "--opener", "ab", "--opener", "cd"]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert len(texts) == 8
    assert {text[:2] for text in texts[::2]} == {"ab"}
    assert {text[:2] for text in texts[1::2]} == {"cd"}
    # The random model continues "ab" with tokens that are not text, so only "cd" is compared.
    assert len(set(texts[1::2])) == 4
