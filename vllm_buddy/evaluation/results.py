"""Writes and reads the results file of an evaluation, a JSON list with one row per figure."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation.figures import Figure

_ROWS = TypeAdapter(list[Figure])


def save_results(figures: Sequence[Figure], path: Path) -> None:
    """Write `figures`, one row per line.

    Raises:
        EvaluationError: the file cannot be written.
    """
    write_rows([figure.row() for figure in figures], path)


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write any rows as a JSON list, one row per line.

    Raises:
        EvaluationError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    except OSError as error:
        raise EvaluationError(f"cannot write {path}: {error.strerror or error}") from None


def load_results(path: Path) -> list[Figure]:
    """Read a file that `save_results` wrote.

    Raises:
        EvaluationError: the file is missing or has another format.
    """
    try:
        figures = _ROWS.validate_json(path.read_bytes())
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise EvaluationError(f"{path} is not a results file of `vllm-buddy eval`: {where}: {first['msg']}") from None
    if not figures:
        raise EvaluationError(f"{path} holds no figures")
    return figures
