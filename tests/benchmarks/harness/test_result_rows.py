"""Tests the results file of a benchmark and what it prints."""

from pathlib import Path

import pytest

from benchmarks.harness.result_rows import print_rows, read_rows, report

FIGURE = {"metric": "ms", "variant": "stock", "p20": 1.0, "p50": 2.0, "p80": 3.0, "n": 3}
NO_FIGURE = {"metric": "can", "variant": "stock", "capability": "batches", "value": "yes"}
ENV = {"commit": "abc", "date": "2026-01-01"}


def test_a_report_is_written_whole_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if rows without percentiles are lost from the file or break the table, or a row has no origin."""
    out = tmp_path / "results" / "cpu_any.jsonl"
    report(out, [FIGURE, NO_FIGURE], ENV)
    assert read_rows(out) == [{**FIGURE, **ENV}, {**NO_FIGURE, **ENV}]
    figure, where = capsys.readouterr().out.splitlines()
    assert figure.split() == ["stock", "ms", "2.000", "[1.000,", "3.000]"]
    assert where == f"written to {out}"


def test_a_report_in_another_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a benchmark's own table is ignored, or printed in addition to the usual one."""
    report(tmp_path / "out.jsonl", [FIGURE], ENV, lambda rows: print(f"{len(rows)} of its own"))
    assert capsys.readouterr().out.splitlines() == ["1 of its own", f"written to {tmp_path / 'out.jsonl'}"]
    print_rows([NO_FIGURE])
    assert capsys.readouterr().out == ""
