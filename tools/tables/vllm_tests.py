"""The tables of docs/vllm_tests.md: vLLM's own tests with stock vLLM, at budget 1.0 and at 0.5."""

from typing import Any

from tools.suite import selection
from tools.suite.environment import MODES, STOCK
from tools.suite.selection import Selection, TestFile
from tools.tables.results import by_key, load_rows, table

RESULTS_FILE = "vllm_tests.jsonl"
_UNEXPLAINED = "**not explained**"


def new_failures(stock: dict[str, Any] | None, row: dict[str, Any]) -> list[str]:
    """The tests that fail in a run and do not with stock vLLM. stock: None where it was not run."""
    return [test for test in row["failed"] if stock is None or test not in stock["failed"]]


def passed_table() -> str:
    """One row per file that was run: its tests, and how many passed in each mode. Then the files that were not."""
    chosen, rows = selection.load(), _rows()
    lines = []
    for file in chosen.files:
        stock = rows.get((file.path, STOCK))
        if stock is not None:
            found = [rows.get((file.path, mode)) for mode in MODES]
            lines.append([f"`{file.path}`", str(_ran(stock)), *(_passed(row, stock) for row in found)])
    heads = ["file", "tests", "stock", "1.0", "0.5"]
    open_ = [f"`{file.path}`" for file in chosen.files if (file.path, STOCK) not in rows]
    rest = ["", f"Chosen, but not run yet: {', '.join(open_)}."] if open_ else []
    return "\n".join([_summary(chosen, rows), "", *table(heads, lines), *rest])


def differences_table() -> str:
    """One row per test that passes with stock vLLM and fails with routing, and why that is right."""
    rows = _rows()
    lines: dict[tuple[selection.TestFile, str], list[str]] = {}
    for file in selection.load().files:
        for mode in MODES[1:]:
            row = rows.get((file.path, mode))
            for test in new_failures(rows.get((file.path, STOCK)), row) if row else ():
                lines.setdefault((file, test), []).append(mode)
    if not lines:
        return "There is none."
    told = [[f"`{_name(f)}::{t}`", ", ".join(modes), _why(f, t)] for (f, t), modes in lines.items()]
    return "\n".join(table(["test", "at", "why"], told))


def left_out_table() -> str:
    """One row per test, or group of tests, of a chosen file that is not run, and why."""
    told = [[f"`{_name(f)}::{left.test}`", left.reason] for f in selection.load().files for left in f.deselected]
    return "\n".join(table(["test", "why"], told))


def _summary(chosen: Selection, rows: dict[tuple[Any, ...], dict[str, Any]]) -> str:
    """A sentence with the sums."""
    parts = []
    for mode, name in zip(MODES, ("with stock vLLM", "at budget 1.0", "at 0.5"), strict=True):
        found = [row for (_, its), row in rows.items() if its == mode]
        parts.append(f"{sum(row['passed'] for row in found):,} of {sum(map(_ran, found)):,} pass {name}")
    dates = sorted(row["date"] for row in rows.values())
    files = len({file for file, _ in rows})
    return f"{files} files. {', '.join(parts)}. vLLM {chosen.vllm}, {dates[-1]}."


def _rows() -> dict[tuple[Any, ...], dict[str, Any]]:
    return by_key(load_rows(RESULTS_FILE), "file", "mode")


def _ran(row: dict[str, Any]) -> int:
    return int(row["passed"]) + len(row["failed"])


def _passed(row: dict[str, Any] | None, stock: dict[str, Any]) -> str:
    """The cell of a run: tests that passed, and whether it says less than that of stock vLLM."""
    if row is None:
        return ""
    text = str(row["passed"])
    if not row["finished"]:
        text += f" (of {_ran(row)}, then cut short)"
    elif _ran(row) != _ran(stock):
        text += f" (of {_ran(row)})"
    return text


def _name(file: TestFile) -> str:
    return file.path.rsplit("/", 1)[-1]


def _why(file: TestFile, test: str) -> str:
    return file.why_different(test) or _UNEXPLAINED
