"""Faults that are injected into a server: killed processes, signals during the start, requests that can never fit."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness.engine import Tiny, start_engine
from tools.features.client import Client
from tools.features.servers import client, server
from vllm_buddy.cli.server_process import ServerProcess
from vllm_buddy.errors import ServerError

ANSWER_TIMEOUT_S = 90.0
PROMPT = list(range(1, 40))
# A tiny model has no tokenizer, so what needs one is turned off.
WITHOUT_TOKENIZER = ("--skip-tokenizer-init", "--no-enable-auto-tool-choice")


@pytest.fixture
def start(tiny: Callable[[str], Tiny], tmp_path: Path) -> Callable[[], Any]:
    """Starts a routed server of the tiny Llama, as a context manager."""
    made = tiny("llama")
    return lambda: server(
        made.folder, tmp_path / "log", artifact=str(made.artifact_folder), arguments=WITHOUT_TOKENIZER
    )


def engine_processes(process: ServerProcess) -> list[psutil.Process]:
    """The engine core and its worker: the children of the API server, and theirs, that hold the model."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [p for p in children if "resource_tracker" not in " ".join(p.cmdline())]


def loaded(c: Client, answers: list[Any]) -> list[threading.Thread]:
    """Start clients with long requests. What becomes of each is added to `answers`: a status, or the kind of error."""

    def ask() -> None:
        try:
            answers.append(c.ask("/v1/completions", prompt=PROMPT, max_tokens=450, ignore_eos=True)[0])
        except (OSError, HTTPException) as error:  # the connection ends with the server
            answers.append(type(error).__name__)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, -1], ids=("the engine core", "its last process"))
def test_a_killed_process_ends_requests_with_an_error_and_a_restart_serves_the_same(
    start: Callable[[], Any], tiny: Callable[[str], Tiny], which: int
) -> None:
    """Fails if clients hang when the engine is gone, processes stay behind, or a restart serves other tokens."""
    folder = tiny("llama").folder
    with start() as process:
        c = client(process, folder, 0.5)
        expected = c.complete(PROMPT)["choices"][0]["token_ids"]
        answers: list[Any] = []
        threads = loaded(c, answers)
        time.sleep(0.5)
        processes = engine_processes(process)
        processes[which].kill()
        for thread in threads:
            thread.join(ANSWER_TIMEOUT_S)
        assert len(answers) == len(threads)
        assert 200 not in answers
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while psutil.pid_exists(process.pid) and psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    with start() as process:
        assert client(process, folder, 0.5).complete(PROMPT)["choices"][0]["token_ids"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [1.0, 6.0, 12.0])
def test_sigterm_during_the_start_ends_all_processes(
    tiny: Callable[[str], Tiny], tmp_path: Path, after_s: float
) -> None:
    """Fails if a server that is stopped while it starts goes on, or leaves processes behind."""
    made = tiny("llama")
    settings = json.dumps({"buddy": {"artifact": str(made.artifact_folder)}})
    arguments = [str(made.folder), "--additional-config", settings, "--skip-tokenizer-init"]
    arguments += ["--kv-cache-memory-bytes", "64M", "--max-model-len", "512"]
    with ServerProcess(arguments, tmp_path / "log") as process:
        time.sleep(after_s)
        group = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        with pytest.raises(ServerError, match="the server ended with status"):
            while time.monotonic() < deadline:
                process.check_alive()
                time.sleep(0.2)
        _, alive = psutil.wait_procs(group, timeout=30)
        assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_a_cache_that_the_longest_request_does_not_fit_is_refused_at_start(tiny: Callable[[str], Tiny]) -> None:
    """Fails if a request can arrive that waits for ever for blocks that there are not."""
    with pytest.raises(ValueError, match="larger than the available KV cache memory"):
        start_engine(tiny("llama"), num_gpu_blocks_override=5)
