"""The command `vllm-buddy eval`, from files to figures."""

import hashlib
import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.harness.tiny_models import random_artifact, save_tiny_model
from vllm_buddy.artifact.provenance import to_yaml
from vllm_buddy.cli.main import main
from vllm_buddy.evaluation import EvalSettings
from vllm_buddy.evaluation.policy import VARIANTS
from vllm_buddy.evaluation.results import load_results, save_results

WINDOWS = ["--window", "32", "--context", "8", "--text-tokens", "200"]
QUESTIONS = [
    {"goal": f"Question {i}", "sol1": "Do this, then that.", "sol2": "Do nothing.", "label": i % 2} for i in range(6)
]
TEXT_METRICS = ["perplexity", "kl", "agreement"]
PIQA_METRICS = ["piqa_acc", "piqa_acc_norm"]


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
    """Options of every evaluation in this module."""
    files = ["--text", str(text_file), "--piqa", str(questions)]
    return [*files, "--model", str(model_with_tokenizer), "--artifact", str(artifact), *WINDOWS, "--dtype", "float32"]


def _eval(data: list[str], out: Path, *options: str) -> list[dict[str, Any]]:
    assert main(["eval", *data, "--json", str(out), *options]) == 0
    return json.loads(out.read_text())


def test_rows(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a figure is missing, has another format, or has another number of layers than its budget."""
    rows = _eval(data, tmp_path / "out.json", "--policy", "buddy,reverse", "--budgets", "1.0,0.75,0.5")
    assert all(list(row) == ["policy", "repair", "budget", "layers", "metric", "value", "stderr", "n"] for row in rows)
    repairs = {("dense", "none"), ("buddy", "bypass"), ("reverse", "none")}
    assert {(row["policy"], row["repair"]) for row in rows} == repairs
    measured = [(row["policy"], row["budget"], row["layers"]) for row in rows if row["metric"] == "kl"]
    settings = [(1.0, 8), (0.75, 6), (0.5, 4)]
    assert measured == [("dense", 1.0, 8), *(("buddy", *s) for s in settings), *(("reverse", *s) for s in settings)]
    own = ["distinct_paths", "top_path_share"]
    for policy, metrics in (("dense", []), ("buddy", own), ("reverse", [])):
        at_full = [row["metric"] for row in rows if row["policy"] == policy and row["budget"] == 1.0]
        assert at_full == [*TEXT_METRICS, *PIQA_METRICS, *metrics]
    by = {(row["policy"], row["budget"], row["metric"]): row for row in rows}
    # 200 tokens are 8 windows of 32 at stride 24, each with 24 scored.
    assert {by[p, b, m]["n"] for p, b, m in by if m in TEXT_METRICS} == {192}
    assert {by[p, b, m]["n"] for p, b, m in by if m in PIQA_METRICS} == {6}
    assert by["dense", 1.0, "kl"]["value"] == 0
    assert by["dense", 1.0, "agreement"]["value"] == 1
    for metric in (*TEXT_METRICS, *PIQA_METRICS):
        assert by["dense", 1.0, metric]["value"] == by["buddy", 1.0, metric]["value"]
    assert by["reverse", 0.5, "perplexity"]["value"] != by["buddy", 0.5, "perplexity"]["value"]
    assert by["buddy", 0.5, "distinct_paths"]["value"] > 1 == by["buddy", 1.0, "distinct_paths"]["value"]
    shown = capsys.readouterr().out
    assert "scoring 192 tokens of" in shown
    assert "8 windows of 32 at stride 24, each after a context of 8" in shown
    assert "6 questions of" in shown
    assert "perplexity" in shown
    assert "wrote" in shown


def test_policies_score_the_same_as_alone(data: list[str], artifact: Path, tmp_path: Path) -> None:
    """Fails if the score of a policy depends on other policies, or NAME=DIR is not the artifact in DIR."""
    together = _eval(data, tmp_path / "a.json", "--policy", f"random,same={artifact},buddy", "--budgets", "0.5,0.75")
    alone = _eval(data, tmp_path / "b.json", "--policy", "buddy", "--budgets", "0.75,0.5")
    assert _by_metric(together, "buddy") == _by_metric(alone, "buddy") == _by_metric(together, "same")


def test_variants_take_routing_away(data: list[str], artifact: Path, tmp_path: Path) -> None:
    """Fails if `frozen` and `prompt_only` do not switch routing off, or `full_prompt` not that of the context."""
    names = f"buddy,buddy:frozen,buddy:prompt_only,x:prompt_only={artifact},buddy:full_prompt"
    rows = _eval(data, tmp_path / "a.json", "--policy", names, "--budgets", "0.5", "--route-every", "2")
    perplexity = {row["policy"]: row["value"] for row in rows if row["metric"] == "perplexity"}
    assert perplexity["buddy:prompt_only"] == perplexity["x:prompt_only"]
    assert len(set(perplexity.values())) == len(perplexity) - 1


def test_path_library_and_kv_policy_are_used(data: list[str], tmp_path: Path) -> None:
    """Fails if an option has no effect."""
    plain = _by_metric(_eval(data, tmp_path / "a.json", "--policy", "buddy", "--budgets", "0.5"), "buddy")
    for options in (["--paths", "free"], ["--kv-policy", "zero"], ["--route-every", "1"], ["--text-skip", "110"]):
        rows = _eval(data, tmp_path / "b.json", "--policy", "buddy", "--budgets", "0.5", *options)
        assert _by_metric(rows, "buddy")[0.5, "perplexity"] != plain[0.5, "perplexity"]
    rows = _eval(data, tmp_path / "c.json", "--policy", "buddy", "--budgets", "0.5", "--piqa-rows", "4")
    assert {row["n"] for row in rows if row["metric"] == "piqa_acc"} == {4}


def test_text_that_was_trained_on_is_a_warning(
    data: list[str], artifact: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if figures on training text pass for figures on new text, or text that is new is warned of."""
    seen = tmp_path / "seen"
    shutil.copytree(artifact, seen)
    source = {"sha256": hashlib.sha256(text_file.read_bytes()).hexdigest(), "weight": 1.0, "share": 0.4}
    (seen / "run.yaml").write_text(to_yaml({"data": {"text.txt": source}}))
    options = ["--policy", f"buddy,seen={seen}", "--budgets", "0.5"]
    _eval(data, tmp_path / "out.json", *options)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert "policy 'seen' was trained on the first 40% of text.txt, 400 tokens" in warning
    _eval(data, tmp_path / "out.json", *options, "--text-skip", "400")
    assert "warning:" not in capsys.readouterr().err
    for record in ("data: [1]", "{", "data: {a: {}}", "- 1"):
        (seen / "run.yaml").write_text(record)
        _eval(data, tmp_path / "out.json", *options)
        assert "warning:" not in capsys.readouterr().err


def test_one_kind_of_data_is_enough(data: list[str], tmp_path: Path) -> None:
    """Fails if a text alone, or questions alone, cannot be evaluated."""
    metrics = {row["metric"] for row in _eval(data[2:], tmp_path / "a.json", "--policy", "reverse")}
    assert metrics == set(PIQA_METRICS)
    metrics = {row["metric"] for row in _eval([*data[:2], *data[4:]], tmp_path / "a.json", "--policy", "reverse")}
    assert metrics == set(TEXT_METRICS)


def test_orders_of_another_model(data: list[str], model_with_tokenizer: Path, text_file: Path, tmp_path: Path) -> None:
    """Fails if an order measured on the fly differs from the one that `vllm-buddy orders` writes."""
    orders = tmp_path / "orders.json"
    sizes = ["--model", str(model_with_tokenizer), "--text", str(text_file), "--methods", "shortgpt"]
    long = tmp_path / "long.txt"
    long.write_text(text_file.read_text() * 20)
    sizes[3] = str(long)
    assert main(["orders", str(orders), *sizes]) == 0
    kept = _eval(data, tmp_path / "a.json", "--policy", "shortgpt", "--orders", str(orders))
    measured = _eval(data, tmp_path / "b.json", "--policy", "shortgpt", "--calibration", str(long))
    assert kept == measured


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


def test_every_setting_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a setting of the schema is not a command line option, or its help leaves out a default or a policy."""
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in EvalSettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert field.description
    assert "(default: 1.0,0.875,0.75,0.5)" in shown
    assert "(default: buddy,shortgpt,sleb)" in shown
    assert "at the start of the text (default: 0)" in shown
    assert all(f"buddy:{variant}" in shown for variant in VARIANTS)


def test_a_window_beyond_the_model_is_refused(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if positions that the model has none for are scored, or end in a traceback of vLLM."""
    (tmp_path / "long.txt").write_text("a b c d " * 1000)
    long = ["eval", *data, "--text", str(tmp_path / "long.txt"), "--text-tokens", "0", "--policy", "buddy"]
    for options, needed in ((["--window", "2049"], 2049), (["--window", "2048", "--engine", "vllm"], 2049)):
        assert main([*long, *options]) == 2
        assert f"the longest sample needs {needed} positions, the model has 2048" in capsys.readouterr().err


def test_figures_that_cannot_be_saved_are_shown(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if hours of measuring are lost because a file cannot be written."""
    assert main(["eval", *data, "--policy", "buddy", "--json", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "cannot write" in shown.err
    assert "buddy" in shown.out


def test_results_are_read_as_they_were_written(data: list[str], tmp_path: Path) -> None:
    """Fails if figures are rounded when they are written and read."""
    out = tmp_path / "a.json"
    _eval(data, out, "--policy", "buddy", "--budgets", "0.5")
    figures = load_results(out)
    save_results(figures, tmp_path / "b.json")
    assert (tmp_path / "b.json").read_text() == out.read_text()
    assert all(math.isfinite(figure.value) for figure in figures)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no figures"),
        ("{}", "is not a results file"),
        (
            '[{"policy": "a", "budget": 1, "layers": 3, "metric": "kl", "value": 0, "stderr": 0, "n": 1}]',
            "is not a results file of `vllm-buddy eval`: 0.repair: Field required",
        ),
    ],
)
def test_a_results_file_of_another_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    """Fails if a results file in another format gives an empty picture or a traceback."""
    monkeypatch.setattr("vllm_buddy.evaluation.plot.check_plotting", lambda: None)
    (tmp_path / "a.json").write_text(content)
    assert main(["plot", str(tmp_path / "a.json"), str(tmp_path / "a.png")]) == 2
    assert message in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "none"), str(tmp_path / "a.png")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_plot_without_matplotlib(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a missing matplotlib is noticed only after the measurement."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert main(["eval", *data, "--plot", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]) == 2
    assert "a plot needs matplotlib; pip install 'vllm-buddy[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


def test_plot(data: list[str], tmp_path: Path) -> None:
    """Fails if a metric or a policy is not drawn, or a zero on a logarithmic scale raises an error."""
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    out = tmp_path / "a.svg"
    _eval(data, tmp_path / "a.json", "--policy", "buddy,reverse", "--plot", str(out))
    picture = out.read_text()
    for shown in ("buddy", "reverse", "unrouted", "perplexity (lower is better)", "PIQA accuracy per character"):
        assert f"<!-- {shown} -->" in picture
    assert main(["plot", str(tmp_path / "a.json"), str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(tmp_path / "a.json"), str(tmp_path / "again.nonsense")]) == 2


def _by_metric(rows: list[dict[str, Any]], policy: str) -> dict[tuple[float, str], tuple[float, float, int]]:
    return {
        (row["budget"], row["metric"]): (row["value"], row["stderr"], row["n"])
        for row in rows
        if row["policy"] == policy
    }
