"""`vllm-buddy doctor`: checks everything that serving needs and says how to repair each failure."""

import argparse
import shutil
from collections.abc import Callable

from vllm_buddy.cli.doctor_checks import Check, check_imports, check_plugin, check_python, check_shipped, check_vllm
from vllm_buddy.cli.doctor_engine import check_engine
from vllm_buddy.cli.server_process import interrupt_on_signals
from vllm_buddy.cli.table import format_table

# Later checks depend on earlier ones, so the first failure is the one to repair first.
CHECKS: tuple[Callable[[], Check], ...] = (
    check_python,
    check_vllm,
    check_imports,
    check_plugin,
    check_shipped,
    check_engine,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-engine", action="store_true", help="skip the check that starts a tiny engine")


def run(args: argparse.Namespace) -> int:
    """Run the checks and print the report; returns 0 if all pass, else 1."""
    interrupt_on_signals()  # the engine has a session of its own
    checks = []
    for function in CHECKS:
        if function is check_engine:
            if args.no_engine:
                continue
            print("vllm-buddy: starting a tiny engine; this takes up to a minute", flush=True)
        checks.append(function())
    print(report(checks, shutil.get_terminal_size((120, 24)).columns))
    return 0 if all(check.ok for check in checks) else 1


def report(checks: list[Check], width: int) -> str:
    """Return the table of checks, and below it what to do about each failure."""
    rows = [[check.name, "ok" if check.ok else "FAIL", check.found.split("\n")[0]] for check in checks]
    lines = [format_table(["check", "", "found"], rows, width)]
    for check in checks:
        if not check.ok:
            lines += ["", f"{check.name}: {check.found}", f"  do: {check.advice}"]
    return "\n".join(lines)
