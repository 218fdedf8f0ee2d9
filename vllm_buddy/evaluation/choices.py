"""Multiple-choice questions in PIQA's format, scored like the LM evaluation harness scores them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation.sample import Sample

_KEYS = ("goal", "sol1", "sol2", "label")
MIN_ROWS = 2  # a standard error needs two


@dataclass(frozen=True)
class ChoiceRow:
    """One question with two solutions. label: index of the right one."""

    goal: str
    solutions: tuple[str, str]
    label: int

    def samples(self, tokenizer: Any) -> list[Sample]:
        """Return one sample per solution, with the question as its context.

        The text is split as in the harness: the context is as many tokens of the whole text as the question alone has.
        """
        question = f"Question: {self.goal}\nAnswer:"
        context = _encode(tokenizer, question)
        return [
            Sample(context + _encode(tokenizer, f"{question} {solution}")[len(context) :], len(context))
            for solution in self.solutions
        ]


def read_choices(path: Path, limit: int | None = None) -> list[ChoiceRow]:
    """Read a JSONL file of objects with `goal`, `sol1`, `sol2` and `label` (0 or 1); other keys are ignored.

    limit: number of rows to return, from the first; all rows are checked.

    Raises:
        EvaluationError: the file is missing, unreadable, not text or too short, or a line has another format; names the
            line.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise EvaluationError(f"cannot read the multiple-choice file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not UTF-8 text (byte {error.start}); give a JSONL file") from None
    rows = [_row(line, f"{path}, line {i}") for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows = rows[:limit]
    if len(rows) < MIN_ROWS:
        raise EvaluationError(f"{path} holds {len(rows)} questions; at least {MIN_ROWS} are needed")
    return rows


def is_right(row: ChoiceRow, totals: Sequence[float], *, per_character: bool) -> bool:
    """Return whether the right solution has the highest log-probability; of equal ones the first is chosen.

    totals: the summed log-probability of each solution. per_character: divide by the solution's length in characters
        first (the harness's acc_norm).
    """
    scores = list(totals)
    if per_character:
        scores = [total / len(solution) for total, solution in zip(totals, row.solutions, strict=True)]
    return scores.index(max(scores)) == row.label


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _row(line: str, where: str) -> ChoiceRow:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{where}: not JSON ({error}); each line must be an object with {_listed()}") from None
    missing = [key for key in _KEYS if key not in row] if isinstance(row, dict) else list(_KEYS)
    if missing:
        raise EvaluationError(f"{where}: no '{missing[0]}'; the line must be an object with {_listed()}")
    for key in _KEYS[:3]:
        if not isinstance(row[key], str) or not row[key].strip():
            raise EvaluationError(f"{where}: {key} is {row[key]!r}, but must be a text that is not empty")
    if type(row["label"]) is not int or row["label"] not in (0, 1):
        raise EvaluationError(f"{where}: label is {row['label']!r}; allowed is 0 (sol1) or 1 (sol2)")
    return ChoiceRow(row["goal"], (row["sol1"], row["sol2"]), row["label"])


def _listed() -> str:
    return ", ".join(_KEYS)
