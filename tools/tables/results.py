"""Reading the results files, and writing Markdown tables."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


def load_rows(name: str) -> list[Row]:
    """All rows of a results file, JSON lines or a JSON list."""
    path = RESULTS / name
    if not path.is_file():
        raise SystemExit(f"{path.relative_to(ROOT)} is missing; run the benchmark that writes it")
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def by_key(rows: Iterable[Row], *fields: str) -> dict[tuple[Any, ...], Row]:
    """Rows by the values of these fields."""
    return {tuple(row[field] for field in fields): row for row in rows}


def where(row: Row) -> str:
    """What a figure was measured on."""
    return f"{row['hardware']}, commit {row['commit']}, {row['date']}"


def rounds_note(rows: Sequence[Row]) -> str:
    """What the figures of a file are medians of, and where they were taken: a sentence."""
    return f"Medians of {rows[0]['n']} rounds with 20th to 80th percentile, {where(rows[0])}."


def number(value: float) -> str:
    """Two decimals below 100, none above."""
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{value:.1%}"


def spread(row: Row | None, form: Callable[[float], str] = number) -> str:
    """p50 (p20 to p80); nothing where there is no figure."""
    return "" if row is None else f"{form(row['p50'])} ({form(row['p20'])} to {form(row['p80'])})"


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, a line each."""
    return [_line(heads), _line(["---"] * len(heads)), *map(_line, lines)]


def section(note: str, heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A sentence, and the table it is about."""
    return "\n".join([note, "", *table(heads, lines)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
