"""The command `vllm-buddy sample`."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial as partial_of
from pathlib import Path

import pytest

from tests.harness.tiny_models import NUM_LAYERS, random_artifact
from tests.importance.conftest import model_with_tokenizer
from vllm_buddy.cli import main, sample
from vllm_buddy.training.drawn_text import Draw, Drawn

__all__ = ["model_with_tokenizer"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jsonl", "--tokens", "0"], "must be positive"),
        (["a.jsonl", "--temperature", "nan"], "must be positive"),
        (["a.jsonl", "--temperature", "inf"], "must be positive"),
        (["a.txt"], "ends in .jsonl"),
        (["none/a.jsonl"], "cannot write"),
        (["a.jsonl", "--questions", "none.json", "--plain"], "leave out --plain and --opener"),
        (["a.jsonl", "--questions", "none.json", "--share", "0"], "at most 1"),
        (["a.jsonl", "--share", "0.1"], "name a file of them with --questions"),
        (["a.jsonl", "--questions", "none.json"], "cannot read the data file none.json"),
        (["a.jsonl", "--artifact", "smollm2-135m"], "name a file of them with --questions"),
        (["a.jsonl", "--budgets", "0.5"], "name an artifact with --artifact"),
    ],
)
def test_bad_input_is_refused_before_vllm_starts(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a wrong option is noticed only after an engine has started, or after sampling."""
    out, *options = arguments
    assert main(["sample", str(tmp_path / out), *options]) == 2
    assert message in capsys.readouterr().err


def test_routed_answers_need_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the full model answers in place of the routed one: without the plugin vLLM serves it silently."""
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    command = ["sample", str(tmp_path / "a.jsonl"), "--questions", "q.json", "--artifact", "smollm2-135m"]
    assert main(command) == 2
    assert "vLLM would not load the plugin" in capsys.readouterr().err


@pytest.mark.parametrize("before", [None, "rows of an earlier run"])
def test_what_is_there_stays_until_all_is_drawn(
    model_with_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """Fails if a run that does not come to its end empties the file, or leaves an empty one."""
    out, partial = tmp_path / "a.jsonl", tmp_path / "a.jsonl.partial"
    if before is not None:
        out.write_text(before)
    command = ["sample", str(out), "--model", str(model_with_tokenizer), "--tokens", "40", "--max-tokens", "20"]

    def generate(draws: Sequence[Draw], *, rounds: int = 1) -> list[Drawn]:
        if len(calls) == rounds:
            raise RuntimeError("killed")
        calls.append(len(draws))
        return [Drawn("x", 1) for _ in draws]

    calls: list[int] = []
    for rounds, rows in ((0, None), (1, 2), (1000, 40)):
        calls.clear()
        monkeypatch.setattr(sample, "_generate", lambda *_, rounds=rounds: partial_of(generate, rounds=rounds))
        with contextlib.nullcontext() if rounds == 1000 else pytest.raises(RuntimeError, match="killed"):
            assert main(command) == 0
        if rounds < 1000:
            assert (out.read_text() if out.exists() else None) == before
            assert (len(partial.read_text().splitlines()) if partial.exists() else None) == rows
    assert len(out.read_text().splitlines()) == rows
    assert not partial.exists()


def test_a_sample_longer_than_the_model_is_refused(
    model_with_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a length beyond the model's ends in vLLM's traceback."""
    out = tmp_path / "a.jsonl"
    assert main(["sample", str(out), "--model", str(model_with_tokenizer), "--max-tokens", "4096"]) == 2
    assert "beyond the model's 2048 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("budgets", "message"), [("0.5,2", "2.0"), ("0.5,x", "'x'; allowed is a number"), ("0.5", "was made for")]
)
def test_routed_answers_need_an_artifact_of_the_model(
    model_with_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], budgets: str, message: str
) -> None:
    """Fails if a budget or an artifact that does not fit the model is noticed by vLLM, in a traceback."""
    (tmp_path / "q.json").write_text(json.dumps([{"instruction": "ab"}]))
    own = random_artifact(tmp_path / "own", model_with_tokenizer)
    assert own.config.base_model.num_layers == NUM_LAYERS
    artifact = "smollm2-135m" if message == "was made for" else str(tmp_path / "own")
    command = ["sample", str(tmp_path / "a.jsonl"), "--model", str(model_with_tokenizer), "--max-tokens", "8"]
    assert main([*command, "--questions", str(tmp_path / "q.json"), "--artifact", artifact, "--budgets", budgets]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_routed_model_answers(model_with_tokenizer: Path, tmp_path: Path) -> None:
    """Fails if answers with an artifact are those of the full model, or budgets do not take turns."""
    questions = [{"instruction": text} for text in ("ab", "cd", "abcd")]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    random_artifact(tmp_path / "artifact", model_with_tokenizer)
    command = [sys.executable, "-m", "vllm_buddy", "sample", str(tmp_path / "out.jsonl"), "--questions"]
    command += [str(tmp_path / "q.json"), "--model", str(model_with_tokenizer), "--max-tokens", "12"]
    routed = ["--artifact", str(tmp_path / "artifact"), "--budgets"]
    answers = []
    for options in ([], [*routed, "1"], [*routed, "0.5"], [*routed, "0.5,1"]):
        done = subprocess.run([*command, *options], env=dict(os.environ), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        answers.append([row["output"] for row in rows])
    stock, full, half, both = answers
    assert stock == full
    assert all(a != b for a, b in zip(full, half))
    assert both == [half[0], full[1], half[2]]


@pytest.mark.slow
def test_samples_can_be_trained_on(model_with_tokenizer: Path, tmp_path: Path) -> None:
    """Fails if rows are of another form than training reads, or begin otherwise than asked."""
    out = tmp_path / "sampled.jsonl"
    command = [sys.executable, "-m", "vllm_buddy", "sample", str(out), "--model", str(model_with_tokenizer)]
    command += ["--tokens", "100", "--max-tokens", "32", "--batch", "2", "--opener", "ab", "--opener", "cd"]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert len(texts) == 4
    assert {text[:2] for text in texts[::2]} == {"ab"}
    assert {text[:2] for text in texts[1::2]} == {"cd"}
    # The random model continues "ab" with tokens that are not text, so only "cd" is compared.
    assert len(set(texts[1::2])) == 2
