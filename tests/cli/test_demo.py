"""The demo's report on made-up answers, and the demo itself (marked slow)."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_buddy.cli import main
from vllm_buddy.cli.budget_list import parse_budgets
from vllm_buddy.cli.chat_client import Answer
from vllm_buddy.cli.demo import write
from vllm_buddy.cli.demo_report import DemoResult
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
    return Answer(prompt, budget, text, 9, 40, seconds, outcome)


def result(alone: list[Answer] | None = None) -> DemoResult:
    requests = [(p, b) for p in ("One?", "Two?") for b in (1.0, 0.5)]
    alone = alone or [answer(p, b, seconds=2 * b) for p, b in requests]
    mixed = [Answer(a.prompt, a.budget, a.text if a.budget == 1 else "other", 9, 40, 8.0, None) for a in alone]
    return DemoResult(NUM_LAYERS, alone, mixed, mixed_wall_s=10.0)


def test_rows_hold_the_engines_count() -> None:
    """Fails if layers and skipped share do not come from the answers, or rates are not per request."""
    full, half = result().rows()
    assert (full["budget"], full["layers_executed_mean"], full["skipped_share"]) == (1.0, 30.0, 0.0)
    assert (half["budget"], half["layers_executed_mean"], half["skipped_share"]) == (0.5, 15.0, 0.5)
    assert (full["tokens_per_s_alone"], half["tokens_per_s_alone"]) == (20.0, 40.0)
    assert half["tokens_per_s_mixed"] == 5.0


def test_answers_are_whole_and_fit_the_terminal() -> None:
    """Fails if an answer is cut, a line is wider than the terminal, or a budget or prompt is missing."""
    words = " ".join(f"word{i}" for i in range(60))
    answers = result([answer(p, b, text=words) for p in ("One?", "Two?") for b in (1.0, 0.5)]).answers(width=60)
    assert max(map(len, answers.split("\n"))) <= 60
    assert [line for line in answers.split("\n") if line.endswith("?")] == ["One?", "Two?"]
    assert " ".join(answers.split()).count("layers " + words) == 4


def test_table_has_a_row_per_budget() -> None:
    """Fails if the table leaves a budget out or mixes them up."""
    lines = result().table().split("\n")
    assert [line.split()[:3] for line in lines[3:]] == [["1.0", "30.0", "0%"], ["0.5", "15.0", "50%"]]


def test_a_mean_beyond_the_budget_is_a_failure_where_tokens_have_depths_of_their_own() -> None:
    """Fails if the demo takes a depth per token for a wrong one, or a mean above the budget for a right one."""
    shallow, deep = answer("One?", 0.5, layers=11), answer("Two?", 0.5, layers=16)
    found = DemoResult(NUM_LAYERS, [shallow, deep], [], 1.0, by_token=True).failures()
    assert len(found) == 1
    assert "16.00 layers" in found[0]


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
    stock = Answer("One?", 1.0, "text", 9, 40, 2.0, None)
    assert "stock" in result([stock, answer("One?", 0.5)]).failures()[0]


def test_all_answers_without_outcome_still_give_a_table() -> None:
    """Fails if the report raises an error when no answer has layer counts."""
    stock = [Answer("One?", b, "text", 9, 40, 2.0, None) for b in (1.0, 0.5)]
    report = result(stock)
    assert len(report.failures()) == 2
    assert "?" in report.table()
    assert "? layers" in report.answers(100)


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


@pytest.mark.parametrize("output", ["folder", ".", "x.html", "file/demo.json"])
def test_an_output_that_cannot_be_written_is_refused_at_once(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if minutes of work end in a traceback, or the page overwrites the figures."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr("vllm_buddy.cli.demo.fetch", lambda **_: pytest.fail("begins"))
    monkeypatch.setattr("vllm_buddy.cli.demo.interrupt_on_signals", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--output", output]) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """Fails if `make demo` does not work with the embedded model and the shipped artifact."""
    output = tmp_path / "results" / "demo.json"
    command = [sys.executable, "-m", "vllm_buddy", "demo", "--output", str(output), "--tokens", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(output.read_text())
    assert [row["layers_executed_mean"] for row in content["rows"]] == [30.0, 22.0, 15.0]
    assert [(row["requests"], row["budget"]) for row in content["load"]][:2] == [(1, "1.0"), (1, "auto")]
    assert content["load"][-1]["layers_executed_mean"] < 30 == content["load"][-2]["layers_executed_mean"]
    assert " INFO " not in done.stdout + done.stderr  # nothing of the server's log
    shown = embedded_data(output.with_suffix(".html"))
    assert [len(a["outcome"]["paths"]["layers"]) for a in shown["requests_alone"]] == [1] * 9


def embedded_data(html: Path) -> dict[str, Any]:
    """The data that the page carries."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html.read_text(), re.DOTALL)
    return json.loads(text)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    """Fails if the page loads something, a placeholder stays in it, or an answer ends its script."""
    content = {"text": "</script><b>", "load": []}
    write(tmp_path / "demo.json", content)
    html = (tmp_path / "demo.html").read_text()
    assert embedded_data(tmp_path / "demo.html") == content
    assert re.findall(r'(?:src|href)="(?!data:,)', html) == []
    assert "/* strip.js */" not in html
    assert "/* page.css */" not in html
