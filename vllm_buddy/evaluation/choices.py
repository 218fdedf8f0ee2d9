"""Multiple choice in PIQA's form, scored as the LM evaluation harness scores it."""

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
    """One question. label: index of the right solution."""

    goal: str
    solutions: tuple[str, str]
    label: int

    def samples(self, tokenizer: Any) -> list[Sample]:
        """One sample per solution; the question is the context.

        The split is the harness's: the question's own tokens, then what follows as many tokens of the whole.
        """
        question = f"Question: {self.goal}\nAnswer:"
        context = _encode(tokenizer, question)
        return [
            Sample(context + _encode(tokenizer, f"{question} {solution}")[len(context) :], len(context))
            for solution in self.solutions
        ]


def read_choices(path: Path, limit: int | None = None) -> list[ChoiceRow]:
    """Read a JSONL file of objects with `goal`, `sol1`, `sol2` and `label` (0 or 1); other keys are ignored.

    limit: the first so many rows are returned; all are checked.

    Raises:
        EvaluationError: missing, unreadable, not text, too few rows, or a row of another form; names the line.
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
    """Whether the right solution has the highest log-probability; of equals the first counts as chosen.

    totals: the summed log-probability of each solution. per_character: divided by the solution's length in characters
        (the harness's acc_norm).
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
        raise EvaluationError(f"{where}: not JSON ({error}); wanted is one object a line with {_listed()}") from None
    missing = [key for key in _KEYS if key not in row] if isinstance(row, dict) else list(_KEYS)
    if missing:
        raise EvaluationError(f"{where}: no '{missing[0]}'; wanted is an object with {_listed()}")
    for key in _KEYS[:3]:
        if not isinstance(row[key], str) or not row[key].strip():
            raise EvaluationError(f"{where}: {key} is {row[key]!r}; wanted is a text that is not empty")
    if type(row["label"]) is not int or row["label"] not in (0, 1):
        raise EvaluationError(f"{where}: label is {row['label']!r}; allowed is 0 (sol1) or 1 (sol2)")
    return ChoiceRow(row["goal"], (row["sol1"], row["sol2"]), row["label"])


def _listed() -> str:
    return ", ".join(_KEYS)
