"""Runs a vLLM server as a child process: starts it, waits until it is healthy and stops all of its processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

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
# What a server is doing, in the order in which it does it: from the line of the log with this text on.
_PHASES = (
    ("non-default args", "reading settings and model configuration"),
    ("Initializing a V1 LLM engine", "starting the engine's processes"),
    ("Starting to load model", "loading the weights"),
    ("Loading weights took", "compiling the layers (longest the first time)"),
    ("KV cache size", "reserving the KV cache and warming up"),
    ("Starting vLLM server", "opening the HTTP port"),
)
_OWN_ERROR = "vllm-buddy: error: "


def interrupt_on_signals() -> None:
    """Handle all signals that end this process like Ctrl-C, so that it stops its children first."""
    signal.signal(signal.SIGINT, _raise_interrupt)
    signal.signal(signal.SIGTERM, _raise_interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # it is ignored under nohup
        signal.signal(signal.SIGHUP, _raise_interrupt)


def _raise_interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class ServerProcess:
    """A process of `vllm-buddy serve` that writes its output to `log`.

    Use it as a context manager; leaving the context stops every process of the server.

    Raises:
        ServerError: the log cannot be written, the server ends, or it is not healthy within `start_timeout_s`. The
            message names its log.
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
        # The server is local and belongs to this process, which sends no key.
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            log = self._log.open("wb")
        except OSError as error:
            raise ServerError(f"cannot write the server's log {self._log}: {error.strerror}") from None
        with log:
            # In its own session, so that one signal also reaches the engine's processes, and Ctrl-C in the terminal
            # reaches this process only.
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=environment,
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
        """Wait until /health answers. report: called twice a second with (seconds so far, what it is doing)."""
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
                    raise ServerError(f"the server was not ready after {elapsed:.0f} s; its log is {self._log}")
                report(elapsed, self.phase())
                time.sleep(_POLL_S)

    def check_alive(self) -> None:
        """Raise a ServerError with the plugin's own reason, if it gave one, if the server has ended."""
        assert self._process is not None
        status = self._process.poll()
        if status is not None:
            reason = next((line for line in self._log_lines() if line.startswith(_OWN_ERROR)), "")
            reason = reason and f": {reason.removeprefix(_OWN_ERROR)}"
            raise ServerError(f"the server ended with status {status}{reason}; its log is {self._log}")

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

    def phase(self) -> str:
        """Return what the server is doing while it starts, in words of its user; empty before its first message."""
        log = "\n".join(self._log_lines())
        return next((words for text, words in reversed(_PHASES) if text in log), "")

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
