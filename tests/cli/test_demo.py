"""The demo's report on made-up answers, and the demo itself (marked slow)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_buddy.cli.chat_client import Answer
from vllm_buddy.cli.demo_report import DemoResult, parse_budgets
from vllm_buddy.errors import BudgetError

NUM_LAYERS = 30
DEPTHS = {1.0: 30, 0.5: 15}


def answer(prompt: str, budget: float, layers: int | None = None, text: str = "some\ntext", seconds: float = 2.0):
    layers = DEPTHS[budget] if layers is None else layers
    outcome = {
        "layers_executed_mean": float(layers),
        "layers_executed_min": layers,
        "layers_executed_max": layers,
    }
    return Answer(prompt, budget, text, 40, seconds, outcome)


def result(alone: list[Answer] | None = None) -> DemoResult:
    requests = [(p, b) for p in ("One?", "Two?") for b in (1.0, 0.5)]
    alone = alone or [answer(p, b, seconds=2 * b) for p, b in requests]
    mixed = [Answer(a.prompt, a.budget, a.text if a.budget == 1 else "other", 40, 8.0, None) for a in alone]
    return DemoResult(NUM_LAYERS, alone, mixed, mixed_wall_s=10.0)


def test_rows_hold_the_engines_count() -> None:
    """Fails if layers and skipped share do not come from the answers, or rates are not per request."""
    full, half = result().rows()
    assert (full["budget"], full["layers_executed_mean"], full["skipped_share"]) == (1.0, 30.0, 0.0)
    assert (half["budget"], half["layers_executed_mean"], half["skipped_share"]) == (0.5, 15.0, 0.5)
    assert (full["tokens_per_s_alone"], half["tokens_per_s_alone"]) == (20.0, 40.0)
    assert half["tokens_per_s_mixed"] == 5.0


def test_table_fits_the_terminal() -> None:
    """Fails if a line of the table is wider than the terminal, or a budget or prompt is missing."""
    lines = result().table(width=90).split("\n")
    assert max(map(len, lines)) <= 90
    assert len(lines) == 3 + 2 * 2  # header of two lines and a rule, two budgets with two prompts
    assert [line.split()[:3] for line in lines[3::2]] == [["1.0", "30.0", "0%"], ["0.5", "15.0", "50%"]]
    assert "some text" in lines[3]


def test_summary_says_how_many_texts_differ() -> None:
    """Fails if the summary hides that texts change in a batch."""
    assert "2 of 4 texts" in result().summary()
    assert "16.0 tokens/s" in result().summary()


def test_wrong_depth_is_a_failure() -> None:
    """Fails if the demo passes although the engine does not keep a budget."""
    assert result().failures() == []
    wrong = result([answer("One?", 0.5, layers=16)]).failures()
    assert len(wrong) == 1
    assert "16" in wrong[0]
    assert "15" in wrong[0]


def test_answer_without_outcome_is_a_failure() -> None:
    """Fails if the demo passes although the stock model is served."""
    stock = Answer("One?", 1.0, "text", 40, 2.0, None)
    assert "stock" in result([stock, answer("One?", 0.5)]).failures()[0]


def test_all_answers_without_outcome_still_give_a_table() -> None:
    """Fails if the report raises an error when no answer has layer counts."""
    stock = [Answer("One?", b, "text", 40, 2.0, None) for b in (1.0, 0.5)]
    report = result(stock)
    assert len(report.failures()) == 2
    assert "?" in report.table(100)


def test_json_is_plain() -> None:
    """Fails if the results cannot be written as plain JSON."""
    content = json.loads(json.dumps(result().as_json()))
    assert len(content["rows"]) == 2
    assert len(content["requests_alone"]) == 4
    assert content["mixed"]["texts_equal_to_alone"] == 2


def test_budgets_are_checked_before_the_server_starts() -> None:
    """Fails if a wrong budget is noticed only after the server has started."""
    assert parse_budgets("1.0,0.5", NUM_LAYERS) == [1.0, 0.5]
    for bad in ("1.0,x", "0", "1.5", "0.05", "nan", ""):
        with pytest.raises(BudgetError):
            parse_budgets(bad, NUM_LAYERS)


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """Fails if `make demo` does not work with the embedded model and the shipped artifact."""
    output = tmp_path / "results" / "demo.json"
    command = [sys.executable, "-m", "vllm_buddy", "demo", "--output", str(output), "--tokens", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [row["layers_executed_mean"] for row in rows] == [30.0, 22.0, 15.0]
    assert "untrained" in done.stdout
