"""Tests the process of economize: requests line by line, replies, and what happens without a reply."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.harness.rounds import Refused
from benchmarks.peers import economize_loop, economize_process
from benchmarks.peers.economize_process import LoopProcess

ECHO = """
import json, os, sys
from benchmarks.peers import economize_loop
economize_loop.serve(sys.stdin, sys.stdout, {
    "echo": lambda **request: request,
    "die": lambda: (sys.stderr.write("out of luck\\n"), os._exit(7)),
    "half": lambda: (os.write(1, b'{"half'), os._exit(0)),
    "sleep": lambda: __import__("time").sleep(60),
})
"""


def echo(tmp_path: Path) -> LoopProcess:
    return LoopProcess([sys.executable, "-c", ECHO], tmp_path / "log")


def test_requests_and_replies_keep_their_order(tmp_path: Path) -> None:
    """Fails if a reply is taken for that of another request."""
    with echo(tmp_path) as process:
        for index in range(3):
            assert process.ask("echo", loop="a", index=index) == {"loop": "a", "index": index}


def test_an_error_over_there_is_refused_here_and_the_process_lives(tmp_path: Path) -> None:
    """Fails if a technique that cannot run is left out silently, or ends the others."""
    with echo(tmp_path) as process:
        with pytest.raises(Refused, match="cannot 'unknown' lookup: KeyError"):
            process.ask("unknown", loop="lookup")
        assert process.ask("echo", index=1) == {"index": 1}


@pytest.mark.parametrize(("how", "said"), [("die", "status 7.*\nout of luck"), ("half", "status 0")])
def test_a_dead_process_is_refused_with_its_last_words(tmp_path: Path, how: str, said: str) -> None:
    """Fails if half a line is read as a reply, or a crash ends in a traceback about pipes."""
    with echo(tmp_path) as process:
        with pytest.raises(Refused, match=f"died with {said}"):
            process.ask(how)
        with pytest.raises(Refused, match="died"):
            process.ask("echo")


def test_no_reply_in_time_is_refused_and_the_process_ended(tmp_path: Path) -> None:
    """Fails if a loop that hangs hangs the benchmark, or outlives it."""
    started = time.monotonic()
    with echo(tmp_path) as process, pytest.raises(Refused, match="has not answered 'sleep' in 0 s"):
        process.ask("sleep", timeout_s=0.2)
    assert process._process.poll() is not None
    assert time.monotonic() - started < 30


def test_serve_answers_every_line() -> None:
    """Fails if an exception ends the loop, or a reply is more than a line."""
    replies = io.StringIO()
    lines = ['{"do": "double", "x": 2}\n', "no JSON\n", '{"do": "double", "x": "a\\nb"}\n']
    economize_loop.serve(lines, replies, {"double": lambda x: {"twice": x * 2}})
    found = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert found[0] == {"twice": 4}
    assert "JSONDecodeError" in found[1]["error"]
    assert found[2] == {"twice": "a\nba\nb"}


def test_pip_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if pip's failure is a traceback, or its reason is lost."""
    failed = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(Refused) as refused:
        economize_process.install(tmp_path)
    said = str(refused.value)
    assert "No matching distribution found" in said
    assert f"pip install --no-deps --quiet --target DIR economize=={economize_process.VERSION}" in said
    assert "--economize" in said


def test_pip_is_asked_for_one_version_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if economize or what it requires gets into the environment, where vLLM would load its plugin."""
    commands = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    assert economize_process.install(tmp_path) == tmp_path
    assert "--no-deps" in commands[0]
    assert commands[0][-3:] == ["--target", str(tmp_path), "economize==0.3.2"]


ABOUT = {"versions": {"economize": "0.3.2", "transformers": "5"}, "threads": 2, "cores": 2}


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({**ABOUT, "versions": {"economize": "0.4.0"}}, "has economize 0.4.0; what is compared here is 0.3.2"),
        ({**ABOUT, "threads": 1}, "1 threads on 2 cores, not 2 as vLLM"),
        ({**ABOUT, "cores": 1}, "2 threads on 1 cores, not 2 as vLLM"),
    ],
)
def test_an_unfair_start_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, about: dict[str, object], said: str
) -> None:
    """Fails if another version, or a process that is bound to fewer cores, is compared."""
    monkeypatch.setattr(LoopProcess, "ask", lambda *_, **__: about)
    with pytest.raises(Refused, match=said), economize_process.started(tmp_path, tmp_path, tmp_path, 2):
        pass
