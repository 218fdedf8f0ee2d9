"""Reads results files and writes Markdown tables."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


def load_rows(name: str) -> list[Row]:
    """Return all rows of a results file, which holds JSON lines or a JSON list."""
    path = RESULTS / name
    if not path.is_file():
        raise SystemExit(f"{path.relative_to(ROOT)} is missing; run the benchmark that writes it")
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def by_key(rows: Iterable[Row], *fields: str) -> dict[tuple[Any, ...], Row]:
    """Return the rows by the values of these fields."""
    return {tuple(row[field] for field in fields): row for row in rows}


def where(row: Row) -> str:
    """Return the hardware, commit and date of a figure."""
    return f"{row['hardware']}, commit {row['commit']}, {row['date']}"


def rounds_note(rows: Sequence[Row]) -> str:
    """Return a sentence that says what the figures of a file are medians of, and where they were measured."""
    return f"Medians of {rows[0]['n']} rounds with 20th to 80th percentile, {where(rows[0])}."


def number(value: float) -> str:
    """Format a number with two decimals below 100 and none above."""
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{value:.1%}"


def spread(row: Row | None, form: Callable[[float], str] = number) -> str:
    """Return "p50 (p20 to p80)", or nothing without a row."""
    return "" if row is None else f"{form(row['p50'])} ({form(row['p20'])} to {form(row['p80'])})"


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [_line(heads), _line(["---"] * len(heads)), *map(_line, lines)]


def section(note: str, heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a note and the table that it describes."""
    return "\n".join([note, "", *table(heads, lines)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
