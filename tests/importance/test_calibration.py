"""Tests of reading a calibration text and cutting it into windows."""

from pathlib import Path
from typing import Any

import pytest

from vllm_buddy.errors import CalibrationError
from vllm_buddy.importance import CalibrationText

TEXT = CalibrationText("letters", "abcdefghij" * 10, "")


def _tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    """Return one token per character."""
    return {"input_ids": [ord(char) - ord("a") for char in text]}


def test_windows_cut_the_start_and_what_follows() -> None:
    """Fails if the held-out windows overlap the windows on which importance is measured."""
    calibration, heldout = TEXT.windows(_tokenizer, 4, 10, 9)
    assert calibration.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert heldout.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert TEXT.windows(_tokenizer, 4, 8)[1].shape == (0, 4)
    assert TEXT.windows(_tokenizer, 3, 6, 3)[1].tolist() == [[6, 7, 8]]


@pytest.mark.parametrize(
    ("window", "num_tokens", "heldout", "message"),
    [
        (1, 10, 0, "a window is 1 tokens; at least 2"),
        (16, 15, 0, "15 calibration tokens are less than one window of 16"),
        (16, 16, 8, "8 held-out tokens are less than one window of 16"),
        (16, 64, 48, "letters holds 100 tokens, but 64 for calibration and 48 held out were asked for"),
    ],
)
def test_sizes_that_do_not_fit(window: int, num_tokens: int, heldout: int, message: str) -> None:
    """Fails if importance is measured on fewer tokens than the settings, and so the record, say."""
    with pytest.raises(CalibrationError, match=message):
        TEXT.windows(_tokenizer, window, num_tokens, heldout)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty; give a text"),
        (b" \n\t\n", "is empty; give a text"),
        (b"abc\xff\xfe", r"is not UTF-8 text \(byte 3\)"),
        (b"abc\0def", "holds NUL bytes, so it is not text"),
    ],
)
def test_files_that_are_not_text(tmp_path: Path, data: bytes, message: str) -> None:
    """Fails if an empty or binary file is accepted as text, so that layers are ranked by noise."""
    path = tmp_path / "data"
    path.write_bytes(data)
    with pytest.raises(CalibrationError, match=message):
        CalibrationText.read(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Fails if a wrong file name raises anything but a CalibrationError that names it."""
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(CalibrationError, match=f"cannot read the text file {path}"):
            CalibrationText.read(path)


def test_the_record_names_the_bytes(tmp_path: Path) -> None:
    """Fails if run.yaml cannot distinguish two texts of the same name."""
    (tmp_path / "a.txt").write_text("héllo")
    text = CalibrationText.read(tmp_path / "a.txt")
    assert (text.name, text.text) == ("a.txt", "héllo")
    assert text.sha256 == "3c48591d8d098a4538f5e013dfcf406e948eac4d3277b10bf614e295d6068179"
