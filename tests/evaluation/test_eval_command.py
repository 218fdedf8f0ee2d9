"""The command `vllm-buddy eval`, from files to figures."""

from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.commands import by_metric, run_eval
from vllm_buddy.cli.main import main
from vllm_buddy.evaluation import EvalSettings
from vllm_buddy.evaluation.policy import VARIANTS
from vllm_buddy.method.batched import routed_hidden

TEXT_METRICS = ["perplexity", "kl", "agreement"]
PIQA_METRICS = ["piqa_acc", "piqa_acc_norm"]


def test_rows(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a figure is missing, has another format, or has another number of layers than its budget."""
    rows = run_eval(data, tmp_path / "out.json", "--policy", "buddy,reverse", "--budgets", "1.0,0.75,0.5")
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


def test_a_smaller_window_takes_less_memory(data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if what a full device is told to lower does not make batches smaller."""
    most: list[int] = []

    def watched(model: Any, token_ids: Any, *others: Any) -> Any:
        most[-1] = max(most[-1], token_ids.numel())
        return routed_hidden(model, token_ids, *others)

    monkeypatch.setattr("vllm_buddy.evaluation.hf_engine.routed_hidden", watched)
    for window in ("48", "24"):
        most.append(0)
        run_eval(data, tmp_path / "out.json", "--policy", "reverse", "--budgets", "0.5", "--window", window)
    assert most[1] <= 4 * 24 < most[0] <= 4 * 48


def test_policies_score_the_same_as_alone(data: list[str], artifact: Path, tmp_path: Path) -> None:
    """Fails if the score of a policy depends on other policies, or NAME=DIR is not the artifact in DIR."""
    together = run_eval(data, tmp_path / "a.json", "--policy", f"random,same={artifact},buddy", "--budgets", "0.5,0.75")
    alone = run_eval(data, tmp_path / "b.json", "--policy", "buddy", "--budgets", "0.75,0.5")
    assert by_metric(together, "buddy") == by_metric(alone, "buddy") == by_metric(together, "same")


def test_variants_take_routing_away(data: list[str], artifact: Path, tmp_path: Path) -> None:
    """Fails if `frozen` and `prompt_only` do not switch routing off, or `full_prompt` not that of the context."""
    names = f"buddy,buddy:frozen,buddy:prompt_only,x:prompt_only={artifact},buddy:full_prompt"
    rows = run_eval(data, tmp_path / "a.json", "--policy", names, "--budgets", "0.5", "--route-every", "2")
    perplexity = {row["policy"]: row["value"] for row in rows if row["metric"] == "perplexity"}
    assert perplexity["buddy:prompt_only"] == perplexity["x:prompt_only"]
    assert len(set(perplexity.values())) == len(perplexity) - 1


def test_path_library_and_kv_policy_are_used(data: list[str], tmp_path: Path) -> None:
    """Fails if an option has no effect."""
    plain = by_metric(run_eval(data, tmp_path / "a.json", "--policy", "buddy", "--budgets", "0.5"), "buddy")
    for options in (["--paths", "free"], ["--kv-policy", "zero"], ["--route-every", "1"], ["--text-skip", "110"]):
        rows = run_eval(data, tmp_path / "b.json", "--policy", "buddy", "--budgets", "0.5", *options)
        assert by_metric(rows, "buddy")[0.5, "perplexity"] != plain[0.5, "perplexity"]
    rows = run_eval(data, tmp_path / "c.json", "--policy", "buddy", "--budgets", "0.5", "--piqa-rows", "4")
    assert {row["n"] for row in rows if row["metric"] == "piqa_acc"} == {4}


def test_one_kind_of_data_is_enough(data: list[str], tmp_path: Path) -> None:
    """Fails if a text alone, or questions alone, cannot be evaluated."""
    metrics = {row["metric"] for row in run_eval(data[2:], tmp_path / "a.json", "--policy", "reverse")}
    assert metrics == set(PIQA_METRICS)
    metrics = {row["metric"] for row in run_eval([*data[:2], *data[4:]], tmp_path / "a.json", "--policy", "reverse")}
    assert metrics == set(TEXT_METRICS)


def test_orders_of_another_model(data: list[str], model_with_tokenizer: Path, text_file: Path, tmp_path: Path) -> None:
    """Fails if an order measured on the fly differs from the one that `vllm-buddy orders` writes."""
    orders = tmp_path / "orders.json"
    sizes = ["--model", str(model_with_tokenizer), "--text", str(text_file), "--methods", "shortgpt"]
    long = tmp_path / "long.txt"
    long.write_text(text_file.read_text() * 20)
    sizes[3] = str(long)
    assert main(["orders", str(orders), *sizes]) == 0
    kept = run_eval(data, tmp_path / "a.json", "--policy", "shortgpt", "--orders", str(orders))
    measured = run_eval(data, tmp_path / "b.json", "--policy", "shortgpt", "--calibration", str(long))
    assert kept == measured


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


def test_figures_that_cannot_be_saved_are_shown(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if hours of measuring are lost because a file cannot be written."""
    assert main(["eval", *data, "--policy", "buddy", "--json", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "cannot write" in shown.err
    assert "buddy" in shown.out
