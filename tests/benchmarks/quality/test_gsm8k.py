"""How answers to GSM8K are marked."""

import json
from pathlib import Path

import pytest

from benchmarks.quality.gsm8k import is_right, last_rows, number
from vllm_buddy.data_file import DataFile


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("So 100/2=50", 50),
        ("The total is $1,250.50.", 1250.5),
        ("**Answer: 7**", 7),
        ("It fell to -3 degrees", -3),
        ("no idea", None),
    ],
)
def test_the_last_number_is_the_answer(text: str, value: float | None) -> None:
    """Fails if thousands, decimals or a full stop at the end change the number."""
    assert number(text) == value


def test_an_answer_without_a_number_is_wrong() -> None:
    """Fails if a loop of words is right because its solution was misread, too."""
    assert is_right("in all 1,000.", "999+1=1000")
    assert not is_right("no idea", "no number")


def test_questions_come_from_the_end(tmp_path: Path) -> None:
    """Fails if questions are asked that the recipes train on."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"instruction": f"q{i}", "output": f"{i}"} for i in range(10)]))
    assert last_rows(DataFile.read(file), 2) == (["q8", "q9"], ["8", "9"])
