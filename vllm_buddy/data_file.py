"""Reads data files for training and evaluation: plain text, or rows of text or of instructions with answers."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_buddy.errors import DataError


@dataclass(frozen=True)
class Exchange:
    """An instruction and its answer, in the model's chat template if it has one.

    prompt: the text up to the start of the answer. whole: prompt and answer in the template. answer: the answer alone.
    """

    prompt: str
    whole: str
    answer: str


@dataclass(frozen=True)
class DataFile:
    """The content of a data file. Exactly one of text and rows is not None. sha256: hash of the file's bytes."""

    path: Path
    sha256: str
    text: str | None = None
    rows: list[Any] | None = None

    @classmethod
    def read(cls, path: Path) -> "DataFile":
        """Read *.txt as text, and *.json (a list) and *.jsonl as rows.

        Raises:
            DataError: the file is missing, unreadable, empty or binary, or does not match its suffix.
        """
        data = _read_bytes(path)
        digest = hashlib.sha256(data).hexdigest()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from None
        if path.suffix == ".txt":
            return cls(path, digest, text=text)
        try:
            if path.suffix == ".json":
                rows = json.loads(text)
            elif path.suffix == ".jsonl":
                rows = _json_lines(path, text)
            else:
                raise DataError(f"{path}: what is in it follows from its ending; known are .txt, .json and .jsonl")
        except DataError:
            raise
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON: {error}") from None
        if not isinstance(rows, list) or not rows:
            raise DataError(f"{path} must hold a list of rows")
        return cls(path, digest, rows=rows)

    def plain(self, index: int) -> str | None:
        """Return the field `text` of row `index`; None if the row is an instruction with an answer.

        Raises:
            DataError: the row is neither.
        """
        assert self.rows is not None
        return plain_text(self.rows[index], f"{self.path}: row {index}")

    def exchange(self, index: int, tokenizer: Any) -> Exchange:
        """Return row `index`, for which `plain` returns None, in the form that the model sees."""
        assert self.rows is not None
        return exchange(self.rows[index], tokenizer)


def plain_text(row: Any, where: str) -> str | None:
    """Return the field `text` of a row; None if the row is an instruction with an answer. where: names it in errors.

    Raises:
        DataError: the row is neither.
    """
    row = row if isinstance(row, dict) else {}
    for name in ("text", "instruction", "input", "output"):
        if isinstance(row.get(name), str) and not _is_unicode(row[name]):
            raise DataError(f"{where}: `{name}` holds half of a surrogate pair, which is no character")
    if isinstance(row.get("text"), str):
        return row["text"]
    if not isinstance(row.get("instruction"), str) or not isinstance(row.get("output"), str):
        raise DataError(f"{where} has neither `text` nor `instruction` and `output`")
    if not isinstance(row.get("input") or "", str):
        raise DataError(f"{where}: `input` is not text")
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def exchange(row: Any, tokenizer: Any) -> Exchange:
    """Return a row for which `plain_text` returns None in the form that the model sees."""
    question = "\n\n".join(part for part in (row["instruction"], row.get("input") or "") if part)
    if not tokenizer.chat_template:
        return Exchange(f"{question}\n\n", f"{question}\n\n{row['output']}", row["output"])
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    return Exchange(prompt, tokenizer.apply_chat_template(messages, tokenize=False), row["output"])


def _json_lines(path: Path, text: str) -> list[Any]:
    # Not splitlines(), which also splits at characters that JSON strings may hold, such as U+2028.
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:  # too many digits, or nested too deeply
            raise DataError(f"{path}: line {number} is not JSON: {error}") from None
    return rows


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror or error}") from None
    if not data.strip():
        raise DataError(f"the data file {path} is empty")
    if b"\0" in data:
        raise DataError(f"{path} holds NUL bytes, so it is not text; give *.txt, *.json or *.jsonl")
    return data
