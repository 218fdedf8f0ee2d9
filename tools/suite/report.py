"""A pytest plugin for vLLM's tests: it writes the outcome of each test as it comes, and lets tests run without CUDA.

A run that is cut short so leaves what it had: one JSON line per test in the file that VLLM_SUITE_REPORT names,
{"file", "test", "outcome", "message", "seconds"}. The plugin is linked into a folder on PYTHONPATH (environment.py) and
imports nothing of this package.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

REPORT_VARIABLE = "VLLM_SUITE_REPORT"
CUDA_VARIABLE = "VLLM_SUITE_IMPORT_AS_CUDA"  # set: test files are imported as if there were CUDA
UNITS_VARIABLE = "VLLM_SUITE_UNITS"  # set: no test starts an engine
IMPORT = "(import)"  # a file that cannot be imported counts as one test of this name
_PATH = re.compile(r"(?<![\w./:])/(?:[\w.-]+/)+[\w.-]*")  # of this machine
_LONGEST_MESSAGE = 300
_found: dict[str, dict[str, Any]] = {}


def pytest_sessionstart() -> None:
    """Load vLLM's plugins, as each process of an engine does, for the tests that start none."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Import a file as if there were CUDA, so that one that skips itself without it is run all the same."""
    if CUDA_VARIABLE not in os.environ or not isinstance(collector, pytest.Module):
        return (yield)
    import tests.utils  # type: ignore[import-not-found]  # noqa: F401  # vLLM's; imports what there is with CUDA only
    from vllm.platforms import current_platform

    with pytest.MonkeyPatch.context() as patch:
        for name in ("is_cuda", "is_cuda_alike"):
            patch.setattr(type(current_platform), name, lambda _self: True)
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the clean-up after each test, a second or more, where there is no engine to clean up after."""
    if UNITS_VARIABLE in os.environ:
        for item in items:
            item.add_marker("skip_global_cleanup")


def pytest_runtest_logreport(report: Any) -> None:
    """Join the phases of a test: it passed if its call did and neither set-up nor tear-down failed."""
    row = _found.setdefault(report.nodeid, _row(report.nodeid, "passed", ""))
    row["seconds"] = round(row["seconds"] + report.duration, 2)
    if report.failed and row["outcome"] != "failed":
        row["outcome"], row["message"] = "failed", _gist(report, report.when)
    elif report.skipped and row["outcome"] == "passed":
        row["outcome"], row["message"] = "skipped", getattr(report, "wasxfail", None) or _reason(report)
    if report.when == "teardown":
        _write(row)


def pytest_collectreport(report: Any) -> None:
    """Write the outcome of a file that is not imported."""
    if report.failed:
        _write(_row(report.nodeid, "failed", _gist(report, "import")))
    elif report.skipped and report.nodeid.endswith(".py"):
        _write(_row(report.nodeid, "skipped", _reason(report)))


def _row(nodeid: str, outcome: str, message: str) -> dict[str, Any]:
    path, _, test = nodeid.partition("::")
    return {"file": path, "test": test or IMPORT, "outcome": outcome, "message": message, "seconds": 0.0}


def _write(row: dict[str, Any]) -> None:
    with open(os.environ[REPORT_VARIABLE], "a") as file:
        file.write(json.dumps(row) + "\n")


def _gist(report: Any, when: str) -> str:
    """The last line of an error, and the phase it came in unless that is the test's own."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else (str(report.longrepr).strip().splitlines() or [""])[-1]
    text = _PATH.sub("<path>", " ".join(text.split()))
    return ("" if when == "call" else f"{when}: ") + text[:_LONGEST_MESSAGE]


def _reason(report: Any) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return " ".join(reason.removeprefix("Skipped: ").split())[:_LONGEST_MESSAGE]
