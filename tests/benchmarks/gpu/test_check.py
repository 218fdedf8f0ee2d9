"""Tests benchmarks.gpu.check, with stubs in place of its parts."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import check as check_module
from benchmarks.gpu.check import ROOT, TABLE, Part, check, environment_of_parts, last_line, parts
from benchmarks.harness.rounds import Refused


def stub(name: str, code: str, least_s: float = 0.0, most_s: float = 60.0) -> Part:
    return Part(name, [sys.executable, "-c", code], least_s, most_s)


def table_lines(out: Path) -> dict[str, str]:
    """Return the lines of the written table, by part."""
    return {line.split()[0]: line for line in (out / TABLE).read_text().splitlines()[2:]}


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    """Fails if the first failure keeps the other parts from running, or goes unnoticed."""
    wanted = [
        stub("good", "print('3 passed\\n')"),
        stub("bad", "import sys; print('1 failed', file=sys.stderr); sys.exit(4)"),
        stub("last", "print('figures')"),
    ]
    assert check(wanted, tmp_path, 60) == 1
    lines = table_lines(tmp_path)
    assert "ok" in lines["good"]
    assert lines["good"].endswith("3 passed")
    assert "failed: status 4" in lines["bad"]
    assert lines["bad"].endswith("1 failed")
    assert "ok" in lines["last"]
    assert (tmp_path / "last.log").read_text() == "figures\n"
    assert check([wanted[0], wanted[2]], tmp_path, 60) == 0


def test_a_part_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    """Fails if an engine that hangs takes all the time, or stays in GPU memory."""
    child = "import time; time.sleep(60)"
    code = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "print(p.pid, flush=True); time.sleep(60)"
    )
    started = time.monotonic()
    assert check([stub("slow", code, most_s=2), stub("next", "print('here')")], tmp_path, 60) == 1
    assert time.monotonic() - started < 20
    lines = table_lines(tmp_path)
    assert "failed: not finished after 2 s" in lines["slow"]
    assert "ok" in lines["next"]
    pid = int((tmp_path / "slow.log").read_text())
    assert not is_running(pid)


def test_a_part_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    """Fails if a benchmark is started only to be killed, or is missing from the table."""
    assert check([stub("long", "print('started')", least_s=100)], tmp_path, 30) == 1
    assert "left out: 30 s left, it takes 100 at least" in table_lines(tmp_path)["long"]
    assert not (tmp_path / "long.log").exists()


def test_results_are_there_before_the_end(tmp_path: Path) -> None:
    """Fails if an interrupted run leaves nothing behind."""
    code = f"import pathlib; print(pathlib.Path({str(tmp_path / TABLE)!r}).read_text())"
    assert check([stub("first", "print('done')"), stub("second", code)], tmp_path, 60) == 0
    assert "first" in (tmp_path / "second.log").read_text()


def test_last_line_is_one_that_says_something(tmp_path: Path) -> None:
    """Fails if the table shows an empty line, or a log with odd bytes ends the check."""
    log = tmp_path / "log"
    log.write_bytes(b"first\nRefused: \xff why\n\n  \n")
    assert last_line(log) == "Refused: \ufffd why"
    log.write_bytes(b"")
    assert last_line(log) == ""


def test_parts_name_files_that_exist(tmp_path: Path) -> None:
    """Fails if a test or benchmark was renamed, or results do not go to OUT."""
    for part in parts(tmp_path):
        files = [argument for argument in part.command if argument.startswith("tests/")]
        files += [f"{a.replace('.', '/')}.py" for a in part.command if a.startswith("benchmarks.")]
        assert files, part.name
        assert all((ROOT / name).exists() for name in files), part.name
        assert part.least_s < part.most_s
    results = {Path(part.command[-1]).name for part in parts(tmp_path) if "--out" in part.command}
    assert results == {"cuda_kernels.jsonl", "cuda_decode.jsonl"}


@pytest.mark.slow
def test_benchmarks_know_their_options(tmp_path: Path) -> None:
    """Fails if the check asks a benchmark for an option that it does not have."""
    for part in parts(tmp_path):
        if "--out" in part.command:
            done = subprocess.run(
                part.command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
            )
            assert done.returncode == 1, done.stderr
            assert "Traceback" not in done.stderr, done.stderr
            assert "CUDA device" in done.stderr.splitlines()[-1]


def test_vllm_finds_the_plugin_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if --model-impl buddy is unknown to vLLM in a checkout that was not installed."""
    monkeypatch.setattr(check_module, "entry_points", lambda group: ())
    env = environment_of_parts(tmp_path)
    code = "from vllm_buddy.cli.plugin_check import GROUP, NAME; from importlib.metadata import distributions; " + (
        "print([(e.name, e.value) for d in distributions(path=[PATH]) for e in d.entry_points if e.group == GROUP])"
    )
    code = code.replace("PATH", repr(str(tmp_path / "plugin")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "[('buddy', 'vllm_buddy.serving.plugin:register')]"
    assert str(tmp_path / "plugin") in env["PYTHONPATH"].split(os.pathsep)


def test_without_a_gpu_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if parts are started on a machine where all of them must fail."""
    monkeypatch.setattr(check_module, "device", lambda: "cpu")
    monkeypatch.setattr("sys.argv", ["check.py", str(tmp_path / "out")])
    with pytest.raises(Refused, match="no CUDA device is found"):
        check_module.main()
    assert not (tmp_path / "out").exists()


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie that waits for its parent."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
