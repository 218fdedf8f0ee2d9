"""Files of training text, from their rows to the sequences of a run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import run
from vllm_buddy.data_file import DataFile
from vllm_buddy.errors import DataError, TrainingError
from vllm_buddy.evaluation.request_samples import SampleShape, request_samples
from vllm_buddy.models.folder import load_tokenizer
from vllm_buddy.training.corpus import Corpus
from vllm_buddy.training.stage1_settings import Stage1Settings


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "cannot read"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n ", "is empty"),
        ("a.txt", b"ab\0cd" * 100, "NUL"),
        ("a.txt", b"\xff\xfe\xfd" * 100, "not UTF-8"),
        ("a.txt", b"short", "less than one sequence"),
        ("a.csv", b"x,y\n" * 100, "known are .txt, .json and .jsonl"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"{}", "list of rows"),
        ("a.jsonl", b'{"question": "?"}', "row 0 has neither"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": ', "line 3 is not JSON"),
        ("a.jsonl", b'{"text": "x", "id": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        ("a.json", b"[" * 10**6, "is not JSON"),
        ("a.jsonl", b'{"text": "a\\ud800b"}', "`text` holds half of a surrogate pair"),
        ("a.jsonl", b'{"instruction": "a", "input": 5, "output": "b"}', "row 0: `input` is not text"),
        ("a.json", b'[{"text": "' + b"x" * 64 + b'"}, {"instruction": 1}]', "row 1 has neither"),
    ],
)
def test_data_that_cannot_be_used_is_refused(
    settings: dict[str, Any], tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    """Fails if unusable data is accepted, or the message does not name the file and what is allowed."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((DataError, TrainingError), match=message) as caught:
        run(settings | {"data": [{"file": tmp_path / name}]})
    assert name in str(caught.value)


def test_rows_of_instructions_become_conversations(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if instruction data loses its inputs or its answers."""
    rows = [{"instruction": f"Say {i}", "input": "twice", "output": f"{i} {i}"} for i in range(200)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    _, stage, _ = run(settings | {"data": [{"file": tmp_path / "rows.json"}]})
    texts = load_tokenizer(settings["model"]).batch_decode(stage.corpus.sequences)
    assert any(re.search(r"Say (\d+)\n\ntwice\n\n\1 \1", text) for text in texts)


def test_a_share_of_rows_is_the_part_that_evaluation_leaves_out(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if training sees rows that `eval-budget` draws its samples from."""
    lengths = [10] * 8 + [200, 200]  # of ten rows, the last two hold most of the tokens
    rows = [{"text": letter * length} for letter, length in zip("abcdefghij", lengths, strict=True)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    sources = Stage1Settings(**settings | {"data": [{"file": tmp_path / "rows.json", "share": 0.8}]}).data
    tokenizer = load_tokenizer(settings["model"])
    corpus = Corpus.read(sources, None, tokenizer, 16, 2, 0)
    assert set(tokenizer.decode(corpus.sequences.ravel(), skip_special_tokens=True)) <= set("abcdefgh")
    file = DataFile.read(tmp_path / "rows.json")
    drawn = request_samples(file, tokenizer, (0.8, 1.0), 2, SampleShape(8, 16, 16), 0)
    assert {char for sample in drawn for char in tokenizer.decode(list(sample.token_ids))} <= set("ij")


def test_a_share_without_rows_is_told(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if a share that rounds to no row ends in a tokenizer's traceback."""
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "abc"}] * 3))
    with pytest.raises(TrainingError, match="less than one sequence"):
        run(settings | {"data": [{"file": tmp_path / "rows.json", "share": 0.3}]})


def test_rows_may_hold_separators_of_lines(tmp_path: Path) -> None:
    """Fails if a string of JSON is cut at a character that ends lines elsewhere."""
    rows = [{"text": "one\u2028two\u0085three"}, {"text": "four"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows))
    assert DataFile.read(file).rows == rows
