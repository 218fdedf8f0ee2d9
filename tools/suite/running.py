"""Runs files of vLLM's tests in one mode, and says what came of each test."""

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.suite import environment
from tools.suite.report import CUDA_VARIABLE, UNITS_VARIABLE
from tools.suite.selection import TestFile

_STOPPING_S = 60.0  # for what a test run does to end its servers
_ONE_TEST_S = 900  # with the start of a server on a busy machine


def run(
    files: Sequence[TestFile], mode: str, *, tests: Path, folder: Path, hub: Path, log: Path, limit_s: float
) -> list[dict[str, Any]]:
    """Return a row of results for each file: how many tests passed, which failed or were skipped, and why.
    "engines" counts the routed ones that were started.

    files: more than one only if none of them starts an engine. tests: the folder that holds vLLM's tests/.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    report = log.with_suffix(".jsonl").absolute()
    report.write_text("")
    command = [sys.executable, "-m", "pytest", "-p", "vllm_suite_report", "-p", "no:cacheprovider", "-q"]
    command += ["--continue-on-collection-errors"]
    command += ["--timeout", str(_ONE_TEST_S), "-o", "asyncio_default_fixture_loop_scope=function"]
    for file in files:
        command += [_target(file), *(f"--deselect={_target(file)}::{left.test}" for left in file.deselected)]
    variables = environment.variables(mode, folder, hub, report)
    if any(file.imported_as_cuda for file in files):
        variables[CUDA_VARIABLE] = "1"
    if not any(file.engine for file in files):
        variables[UNITS_VARIABLE] = "1"
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=tests, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit_s)
            finished = process.poll() in (0, 1)  # pytest's: all tests ran, and perhaps some failed
            written = report.read_text()  # before its end, which fails the test that runs and those after it
        finally:
            _end(process)
    lines = [json.loads(line) for line in written.splitlines()]
    found = [line for line in lines if "test" in line]
    common: dict[str, Any] = {"engines": len(lines) - len(found), "finished": finished}
    common |= {"seconds": round(time.monotonic() - started), "date": str(datetime.date.today())}
    return [
        {"file": file.path, "mode": mode, **_outcomes([r for r in found if r["file"] == _target(file)]), **common}
        for file in files
    ]


def _target(file: TestFile) -> str:
    return f"tests/{file.path}"


def _outcomes(found: list[dict[str, Any]]) -> dict[str, Any]:
    messages = {
        outcome: {row["test"]: row["message"] for row in found if row["outcome"] == outcome}
        for outcome in ("passed", "failed", "skipped")
    }
    return {**messages, "passed": len(messages["passed"])}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a test run with all that it started: gently, because its servers end in its clean-up, and then not."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOPPING_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
