"""What `vllm-buddy eval` refuses or warns of: wrong options, data and artifacts."""

import hashlib
import shutil
from pathlib import Path

import pytest

from tests.evaluation.commands import run_eval
from tests.harness.tiny_models import random_artifact, save_tiny_model
from vllm_buddy.artifact.provenance import to_yaml
from vllm_buddy.cli.main import main


def test_text_that_was_trained_on_is_a_warning(
    data: list[str], artifact: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if figures on training text pass for figures on new text, or text that is new is warned of."""
    seen = tmp_path / "seen"
    shutil.copytree(artifact, seen)
    source = {"sha256": hashlib.sha256(text_file.read_bytes()).hexdigest(), "weight": 1.0, "share": 0.4}
    (seen / "run.yaml").write_text(to_yaml({"data": {"text.txt": source}}))
    options = ["--policy", f"buddy,seen={seen}", "--budgets", "0.5"]
    run_eval(data, tmp_path / "out.json", *options)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert "policy 'seen' was trained on the first 40% of text.txt, 400 tokens" in warning
    run_eval(data, tmp_path / "out.json", *options, "--text-skip", "400")
    assert "warning:" not in capsys.readouterr().err
    for record in ("data: [1]", "{", "data: {a: {}}", "- 1"):
        (seen / "run.yaml").write_text(record)
        run_eval(data, tmp_path / "out.json", *options)
        assert "warning:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "budy"], "unknown policy 'budy'; known are dense, buddy, shortgpt"),
        (["--policy", "buddy,buddy"], "policy 'buddy' is named twice"),
        (["--policy", "buddy:full_prompt", "--engine", "vllm"], "policy 'buddy:full_prompt' needs engine hf"),
        (["--policy", "buddy:token", "--engine", "vllm"], "policy 'buddy:token' needs engine hf"),
        (["--policy", "buddy:shuffled", "--engine", "vllm"], "policy 'buddy:shuffled' needs engine hf"),
        (["--budgets", "1.0,1.5"], "budget is 1.5; allowed is a number in (0, 1]"),
        (["--budgets", "half"], "budgets are 'half', but must be numbers in (0, 1] with commas between them"),
        (["--budgets", "0.1"], "leaves 0 of 8 layers, but at least 3 must run; the smallest allowed budget is 0.375"),
        (["--context", "32"], "a window of 32 tokens with a context of 32 scores none"),
        (["--stride", "8"], "stride 8 scores tokens twice"),
        (["--text", "none.txt"], "cannot read the text file none.txt"),
        (["--piqa", "none.jsonl"], "cannot read the multiple-choice file none.jsonl"),
        (["--text-tokens", "40"], "the text has 40 tokens to score"),
        (["--engine", "sglang"], "engine: Input should be 'hf' or 'vllm'"),
        (["--kv-policy", "none"], "kv_policy: Input should be 'masked', 'kv_only' or 'zero'"),
        (["--route-every", "-1"], "route_every: Input should be greater than or equal to 0"),
        (["--artifact", "none"], "no artifact at none"),
        (["--policy", "mine=none"], "no artifact at none"),
        (["--policy", "sleb"], "has not been measured for bytes"),
        (["--policy", "sleb"], "--text TEXT` and name FILE with --orders, or give a text to measure it on with"),
        (["--policy", "sleb", "--calibration", "none.txt"], "cannot read the text file none.txt"),
        (["--orders", "none.json"], "cannot read the layer orders none.json"),
        (["--model", "none"], "no model at none"),
    ],
)
def test_mistakes_are_one_line(
    data: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    """Fails if a mistake ends in a traceback, or shows only after a model is loaded."""
    monkeypatch.setattr("vllm_buddy.models.folder.load_model", lambda *args: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    policy = [] if "--policy" in options else ["--policy", "buddy"]
    assert main(["eval", *data, *policy, "--json", "out.json", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_data_of_the_wrong_kind(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if an empty or binary text is scored, or an evaluation without data runs."""
    for content, message in ((b"", "is empty"), (b"\xff\x00", "is not UTF-8 text"), (b"a\0b", "holds NUL bytes")):
        (tmp_path / "bad").write_bytes(content)
        assert main(["eval", *data, "--text", str(tmp_path / "bad")]) == 2
        assert message in capsys.readouterr().err
    assert main(["eval", *data[4:]]) == 2
    assert "nothing to measure on; give --text, --piqa or both" in capsys.readouterr().err


def test_an_order_is_not_measured_on_what_is_evaluated(
    data: list[str], text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a static method has seen the text on which it is compared, or other parts of a file are refused."""
    command = ["eval", *data, "--policy", "sleb", "--calibration", str(text_file)]
    assert main(command) == 2
    assert "would be measured on the first 4096 tokens of the text that is evaluated" in capsys.readouterr().err
    assert main([*command, "--text-skip", "4096"]) == 2
    assert "tokens to score" in capsys.readouterr().err


def test_an_artifact_of_another_model(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if paths and repairs of one model are applied to another."""
    other = save_tiny_model(tmp_path / "other", "llama", seed=1)
    random_artifact(tmp_path / "artifact", other)
    assert main(["eval", *data, "--policy", f"mine={tmp_path / 'artifact'}"]) == 2
    error = capsys.readouterr().err
    assert "policy 'mine': artifact 'artifact' was made for other" in error
    assert "but the model is bytes" in error


def test_a_budget_that_the_library_lacks(
    data: list[str], model_with_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if another depth than the budget's is measured, or the run ends in the middle."""
    random_artifact(tmp_path / "none", model_with_tokenizer, paths_per_depth=0)
    assert main(["eval", *data, "--policy", f"x={tmp_path / 'none'}", "--paths", "library"]) == 2
    assert "has no path library" in capsys.readouterr().err


def test_a_window_beyond_the_model_is_refused(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if positions that the model has none for are scored, or end in a traceback of vLLM."""
    (tmp_path / "long.txt").write_text("a b c d " * 1000)
    long = ["eval", *data, "--text", str(tmp_path / "long.txt"), "--text-tokens", "0", "--policy", "buddy"]
    for options, needed in ((["--window", "2049"], 2049), (["--window", "2048", "--engine", "vllm"], 2049)):
        assert main([*long, *options]) == 2
        assert f"the longest sample needs {needed} positions, the model has 2048" in capsys.readouterr().err
