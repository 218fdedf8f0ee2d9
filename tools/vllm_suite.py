"""Runs vLLM's own public tests with routing on, for docs/vllm_tests.md.

    python -m tools.vllm_suite                          # what has no result yet, with stock vLLM, at 1.0 and at 0.5
    python -m tools.vllm_suite --only completion --again
    python -m tools.vllm_suite --stock                  # stock vLLM only

The tests come from vLLM's source distribution on PyPI, into a cache folder. Every engine that they start runs
SmolLM2-135M, whatever model they name, and is routed, except with stock vLLM, whose run says which tests can pass on
this machine at all. Results are kept per file, in benchmarks/results/vllm_tests.jsonl, from which
`python -m tools.readme` writes the page. Hours on 2 cores.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.suite import environment, hub, sdist, selection
from tools.suite.running import run
from tools.suite.selection import TestFile
from tools.tables.results import RESULTS, ROOT
from tools.tables.vllm_tests import new_failures

OUT = RESULTS / "vllm_tests.jsonl"
_LIMIT_S = 2400


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for; returns 1 if a test fails that passes with stock vLLM and has no reason to."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.vllm_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="parts of paths; runs these files")
    parser.add_argument("--modes", nargs="*", default=environment.MODES, choices=environment.MODES)
    parser.add_argument("--stock", dest="modes", action="store_const", const=(environment.STOCK,), help="no routing")
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--limit-s", type=float, default=_LIMIT_S, help="longest time of a file in one mode")
    parser.add_argument("--cache", type=Path, default=_cache(), help="folder for vLLM's tests, packages and models")
    parser.add_argument("--logs", type=Path, default=ROOT / "results" / "vllm_suite", help="folder for logs")
    args = parser.parse_args(argv)
    chosen = selection.load()
    files = [file for file in chosen.files if not args.only or any(part in file.path for part in args.only)]
    tests = sdist.fetch(chosen.vllm, args.cache)
    environment.make(args.cache / "packages", chosen.vllm)
    shared = [*(tests / "tests").rglob("conftest.py"), *(tests / "tests").rglob("utils.py")]
    hub.make(args.cache / "hub", [*shared, *(tests / "tests" / file.path for file in files)], chosen.adapters)
    hub.make_assets(args.cache / "hub" / environment.ASSETS)
    wrong = []
    for batch, mode in _batches(files, args.modes, set() if args.again else set(_rows())):
        name = batch[0].path if len(batch) == 1 else f"{len(batch)} files without engines"
        print(f"{name}, {mode} ...", flush=True)
        log = args.logs / f"{batch[0].path.removesuffix('.py').replace('/', '.')}-{mode}.log"
        folders = {"folder": args.cache / "packages", "hub": args.cache / "hub", "log": log}
        found = run(batch, mode, tests=tests, limit_s=args.limit_s, **folders)
        rows = _rows() | {(row["file"], mode): {**row, "commit": _commit()} for row in found}
        _write(rows)
        for file, row in zip(batch, found, strict=True):
            new = new_failures(rows.get((file.path, environment.STOCK)), row)
            wrong += [test for test in new if file.why_different(test) is None]
            end = f"{row['seconds']} s" if row["finished"] else f"cut short after {row['seconds']} s"
            print(f"  {file.path}: {row['passed']} passed, {len(row['failed'])} failed, {end}; new: {new}", flush=True)
    return 1 if wrong else 0


def _batches(
    files: list[TestFile], modes: Sequence[str], done: set[tuple[str, str]]
) -> Iterator[tuple[list[TestFile], str]]:
    """What to run, and in which mode: each file alone, except that those without engines share a process."""
    open_ = [(file, mode) for file in files for mode in file.modes if mode in modes and (file.path, mode) not in done]
    for mode in modes:
        if units := [file for file, its in open_ if its == mode and not file.engine]:
            yield units, mode
    for file, mode in open_:
        if file.engine:
            yield [file], mode


def _rows() -> dict[tuple[str, str], dict[str, Any]]:
    lines = OUT.read_text().splitlines() if OUT.is_file() else []
    return {(row["file"], row["mode"]): row for row in map(json.loads, lines)}


def _write(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    partial = OUT.with_suffix(".partial")
    partial.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))
    partial.rename(OUT)


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vllm_buddy" / "vllm_suite"


if __name__ == "__main__":
    sys.exit(main())
