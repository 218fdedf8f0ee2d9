"""Multiple-choice questions: reading a file, splitting into tokens, and accuracy."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluation.conftest import Tiny
from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation import Policy, Scores, Variant
from vllm_buddy.evaluation.choices import ChoiceRow, is_right, read_choices
from vllm_buddy.evaluation.figures import choice_figures
from vllm_buddy.method import PathSchedule
from vllm_buddy.models.folder import load_tokenizer

ROW = {"goal": "Open a jar.", "sol1": "Turn it.", "sol2": "Shout at it.", "label": 0}


def _write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_rows_are_read_and_cut(tmp_path: Path) -> None:
    """Fails if a line separator inside a text splits a row, extra keys are refused, or the limit takes other rows."""
    odd = {**ROW, "goal": "a\u2028b", "id": 7, "label": 1}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n" + json.dumps(odd, ensure_ascii=False) + "\n" + json.dumps(ROW))
    assert read_choices(path) == [
        ChoiceRow("Open a jar.", ("Turn it.", "Shout at it."), 0),
        ChoiceRow("a\u2028b", ("Turn it.", "Shout at it."), 1),
        ChoiceRow("Open a jar.", ("Turn it.", "Shout at it."), 0),
    ]
    assert len(read_choices(path, 2)) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, {**ROW, "label": 2}], "line 2: label is 2; allowed is 0 .sol1. or 1 .sol2."),
        ([ROW, {**ROW, "label": True}], "line 2: label is True"),
        ([ROW, {**ROW, "label": "1"}], "line 2: label is '1'"),
        (
            [{"goal": "a", "sol1": "b", "label": 0}, ROW],
            "line 1: no 'sol2'; the line must be an object with goal, sol1, sol2",
        ),
        ([ROW, {**ROW, "sol1": " "}], "line 2: sol1 is ' ', but must be a text that is not empty"),
        ([ROW, {**ROW, "goal": 3}], "line 2: goal is 3"),
        ([ROW, [1]], "line 2: no 'goal'"),
        ([ROW, "{"], "line 2: not JSON"),
        ([ROW], "holds 1 questions; at least 2 are needed"),
        ([], "holds 0 questions"),
    ],
)
def test_rows_of_another_form(tmp_path: Path, rows: list[Any], message: str) -> None:
    """Fails if a row in another format ends in a traceback, or is dropped without a message."""
    with pytest.raises(EvaluationError, match=message):
        read_choices(_write(tmp_path / "rows.jsonl", *rows))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Fails if a missing or binary file ends in a traceback."""
    with pytest.raises(EvaluationError, match="cannot read the multiple-choice file"):
        read_choices(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match=r"is not UTF-8 text .byte 0.; give a JSONL file"):
        read_choices(tmp_path / "binary")


def test_question_and_answer_as_tokens(model_with_tokenizer: Path) -> None:
    """Fails if the question is scored, the space before the answer is lost, or the wording is not the harness's."""
    tokenizer = load_tokenizer(model_with_tokenizer)
    first, second = ChoiceRow("Open a jar.", ("Turn it.", "Shout."), 0).samples(tokenizer)
    assert tokenizer.decode(first.token_ids[: first.num_context]) == "Question: Open a jar.\nAnswer:"
    assert tokenizer.decode(list(first.targets)) == " Turn it."
    assert tokenizer.decode(list(second.targets)) == " Shout."
    assert first.num_context == second.num_context


def test_accuracy_on_a_constructed_set(tiny: Tiny) -> None:
    """Fails if the lower score wins, tokens are averaged, or length is counted in tokens."""
    rows = [
        ChoiceRow("q", ("ab", "abcdefgh"), 0),  # -4 against -5: 0 wins, right; per character -2 against -0.625: 1 wins
        ChoiceRow("q", ("ab", "abcdefgh"), 1),  # the same scores: wrong; per character right
        ChoiceRow("q", ("ab", "ab"), 0),  # -3 against -3: the first wins, right
        ChoiceRow("q", ("ab", "ab"), 1),  # -1 against -2: wrong
    ]
    logprobs = [[-1.0, -3.0], [-5.0], [-4.0], [-2.0, -3.0], [-3.0], [-1.0, -2.0], [-1.0], [-2.0]]
    scores = Scores([np.array(x) for x in logprobs], [np.zeros(len(x), dtype=int) for x in logprobs])
    variant = Variant(Policy("buddy", tiny.artifact, PathSchedule(0)), 0.5, 4)
    acc, acc_norm = choice_figures(variant, scores, rows)
    assert (acc.metric, acc.value, acc.n) == ("piqa_acc", 0.5, 4)
    assert (acc_norm.metric, acc_norm.value) == ("piqa_acc_norm", 0.5)
    assert math.isclose(acc.stderr, math.sqrt(0.25 / 3))
    assert [is_right(row, (-4.0, -5.0), per_character=False) for row in rows[:2]] == [True, False]
    assert [is_right(row, (-4.0, -5.0), per_character=True) for row in rows[:2]] == [False, True]
