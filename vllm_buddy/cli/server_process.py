"""Runs a vLLM server as a child process: starts it, waits until it is healthy and stops all of its processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from vllm_buddy.cli.table import shorten
from vllm_buddy.errors import ServerError

if TYPE_CHECKING:
    import httpx
    import psutil

HOST = "127.0.0.1"
_POLL_S = 0.5
_HEALTH_TIMEOUT_S = 2.0
_SERVER_STOP_S = 10.0
_GROUP_STOP_S = 6.0
_TRACKER_STOP_S = 3.0
_TAIL_LINES = 25
# The prefix of "(EngineCore pid=12) INFO 11-22 07:05:36 [core.py:120] text"; a progress line shows only the text.
_LOG_PREFIX = re.compile(r"^(\(.*?pid=\d+\) )?([A-Z]+ \d\d-\d\d [\d:]+ \[[^\]]*\] )?")
_LETTER = re.compile(r"[A-Za-z]{3}")


class ServerProcess:
    """A process of `vllm-buddy serve` that writes its output to `log`.

    Use it as a context manager; leaving the context stops every process of the server.

    Raises:
        ServerError: the server ends, or is not healthy within `start_timeout_s`. The message has the end of its log.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        start_timeout_s: float = 300.0,
        program: Sequence[str] = (sys.executable, "-m", "vllm_buddy", "serve"),
    ) -> None:
        self.port = free_port()
        self.start_s = 0.0
        self._command = [*program, *arguments, "--host", HOST, "--port", str(self.port)]
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ServerProcess":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            # In its own session, so that one signal also reaches the engine's processes, and Ctrl-C in the terminal
            # reaches this process only.
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the server's first process, the parent of the others."""
        assert self._process is not None
        return self._process.pid

    def wait_until_healthy(self, report: Callable[[float, str], None]) -> None:
        """Wait until /health answers. report: called twice a second with (seconds so far, last message in the log)."""
        import httpx

        start = time.monotonic()
        # The server is local: a proxy from the environment would not reach it.
        with httpx.Client(timeout=_HEALTH_TIMEOUT_S, trust_env=False) as client:
            while True:
                elapsed = time.monotonic() - start
                self.check_alive()
                if self._healthy(client):
                    self.start_s = elapsed
                    return
                if elapsed > self._start_timeout_s:
                    raise ServerError(f"the server was not ready after {elapsed:.0f} s\n{self.log_tail()}")
                report(elapsed, self.log_gist())
                time.sleep(_POLL_S)

    def check_alive(self) -> None:
        """Raise a ServerError with the end of the log if the server has ended."""
        assert self._process is not None
        status = self._process.poll()
        if status is not None:
            raise ServerError(f"the server ended with status {status}\n{self.log_tail()}")

    def stop(self) -> None:
        """End the server and every process of its group, first with SIGTERM, then with SIGKILL."""
        server, self._process = self._process, None
        if server is None:
            return
        try:
            # A server that is starting handles the signal only after the start; its engine handles it at once.
            if self.start_s and server.poll() is None:
                server.terminate()
                if _wait_for_end(server, _SERVER_STOP_S):
                    return
            _signal_all(_group(server.pid), signal.SIGTERM)
            if _wait_for_end(server, _GROUP_STOP_S):
                return
        except KeyboardInterrupt:
            pass  # a second Ctrl-C ends the waiting
        # The resource tracker frees the shared memory of killed processes, and ends after that.
        _signal_all([p for p in _group(server.pid) if not _is_resource_tracker(p)], signal.SIGKILL)
        if not _wait_for_end(server, _TRACKER_STOP_S):
            _signal_all(_group(server.pid), signal.SIGKILL)
        server.wait()

    def log_gist(self) -> str:
        """Return the last message in the log, without the prefix of log lines."""
        for line in reversed(self._log_lines()):
            text = _LOG_PREFIX.sub("", line).strip()
            if _LETTER.search(text):
                return shorten(text, 80)
        return ""

    def log_tail(self) -> str:
        """Return the end of the log, for an error message."""
        lines = self._log_lines()[-_TAIL_LINES:]
        return "\n".join([f"--- end of {self._log} ---", *lines, "---"])

    def _log_lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines() if self._log.is_file() else []

    def _healthy(self, client: "httpx.Client") -> bool:
        import httpx

        try:
            return client.get(f"http://{HOST}:{self.port}/health").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


def _wait_for_end(server: "subprocess.Popen[bytes]", timeout_s: float) -> bool:
    """Return whether the server and all other processes of its group end within `timeout_s`."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if server.poll() is not None and not _group(server.pid):
            return True
        time.sleep(0.2)
    return False


def _group(group: int) -> "list[psutil.Process]":
    """Return the running processes of a group. Zombies do not count, because in a container nobody may reap them."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def _is_resource_tracker(process: "psutil.Process") -> bool:
    import psutil

    try:
        return any("multiprocessing.resource_tracker" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _signal_all(processes: "list[psutil.Process]", signum: int) -> None:
    import psutil

    for process in processes:
        try:
            process.send_signal(signum)
        except psutil.NoSuchProcess:
            continue


def free_port() -> int:
    """Return a port that nothing listens on at this moment."""
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])
