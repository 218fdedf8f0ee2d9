"""Tests of the questions whose answer is a copy."""

import json
from pathlib import Path

import pytest

from tools import copy_questions
from tools.copy_questions import ASKED, questions

PASSAGES = [" ".join(f"{word}{n}" for n in range(30)) for word in ("a", "b")]


def test_each_paragraph_of_fit_length_is_asked_for_once() -> None:
    """Fails if a passage is cut or asked for twice, a heading is asked for, or all are asked for in the same words."""
    text = f"Title\n{PASSAGES[0]}\n\n{PASSAGES[1]}"
    asked = [row["instruction"] for row in questions([text, PASSAGES[0]])]
    assert asked == [f"{ASKED[0]}\n\n{PASSAGES[0]}", f"{ASKED[1]}\n\n{PASSAGES[1]}"]


@pytest.mark.parametrize("rows", [["text"], [{"input": "text"}], [{"output": 3}]])
def test_rows_without_an_answer_are_refused_in_one_line(
    rows: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a file of another form gives a traceback, or questions without passages."""
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr("sys.argv", ["copy_questions", str(tmp_path / "rows.json"), str(tmp_path / "out.json")])
    with pytest.raises(SystemExit):
        copy_questions.main()
    assert "must hold rows with an `output`" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
