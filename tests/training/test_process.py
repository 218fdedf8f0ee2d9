"""`vllm-buddy train` as a process: killed, distributed over two processes, and given a mistake."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.training.conftest import ON_CPU, TWO_PROCESSES
from vllm_buddy.artifact import load_artifact
from vllm_buddy.training.loop import LOG_FILE

# Gradients of the same micro-batches are summed over processes in another order.
TOLERANCE = 1e-4


def write_config(settings: dict[str, Any], path: Path) -> Path:
    plain = json.loads(json.dumps(settings, default=str))
    path.write_text(yaml.safe_dump(plain))
    return path


def train(config: Path, *overrides: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen[str]:
    command = [*launcher, "-m", "vllm_buddy", "train", str(config), *overrides]
    environment = os.environ | (ON_CPU if launcher == TWO_PROCESSES else {})
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / LOG_FILE).read_text().splitlines()]


def kill(process: subprocess.Popen[str]) -> None:
    """End a process and those that it started, without a chance to clean up."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(started, timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "shared"), [((sys.executable,), False), (TWO_PROCESSES, True)], ids=["one process", "two that share"]
)
def test_a_killed_run_ends_where_an_undisturbed_one_ends(
    settings: dict[str, Any], tmp_path: Path, launcher: tuple[str, ...], shared: bool
) -> None:
    """Fails if a killed run loses steps or counts them twice when it is resumed."""
    changes = {"tokens": 60 * 4 * 32, "name": "killed", "shard_base": shared}
    config = write_config(settings | changes, tmp_path / "run.yaml")
    assert train(config, f"out={tmp_path / 'whole'}", launcher=launcher).wait(300) == 0
    out = tmp_path / "killed"
    process = train(config, f"out={out}", launcher=launcher)
    deadline = time.monotonic() + 120
    while not (out / LOG_FILE).is_file() or len((out / LOG_FILE).read_text().splitlines()) < 7:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    kill(process)
    assert not (out / "buddy_config.json").exists()
    assert train(config, f"out={out}", launcher=launcher).wait(300) == 0
    assert losses(out) == losses(tmp_path / "whole")
    assert load_artifact(out).digest == load_artifact(tmp_path / "whole").digest


@pytest.mark.slow
def test_two_processes_train_what_one_trains(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if each process sees all data, gradients are not summed, or a base shared out computes otherwise."""
    pytest.importorskip("accelerate")
    config = write_config(settings, tmp_path / "run.yaml")
    assert train(config, f"out={tmp_path / 'one'}").wait(300) == 0
    for name, words in {"two": (), "shared": ("shard_base=true",)}.items():  # the second is refused to one process
        process = train(config, f"out={tmp_path / name}", *words, launcher=TWO_PROCESSES)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=TOLERANCE)


def test_a_mistake_is_one_line_and_an_exit_code(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if a mistyped file name ends in a traceback."""
    config = write_config(settings | {"data": [{"file": str(tmp_path / "none.txt")}]}, tmp_path / "run.yaml")
    _, stderr = (process := train(config)).communicate(timeout=120)
    assert process.returncode == 2
    assert "cannot read the data file" in stderr
    assert "Traceback" not in stderr
