"""A vLLM server as a child process: start, wait until it is healthy, stop, leaving nothing behind."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from types import TracebackType

from vllm_buddy.cli.table import shorten
from vllm_buddy.errors import ServerError

HOST = "127.0.0.1"
_POLL_S = 0.5
_STOP_TIMEOUT_S = 20.0
_TAIL_LINES = 25
# "(EngineCore pid=12) INFO 11-22 07:05:36 [core.py:120] text", of which a progress line wants the text.
_LOG_PREFIX = re.compile(r"^(\(.*?pid=\d+\) )?([A-Z]+ \d\d-\d\d [\d:]+ \[[^\]]*\] )?")
_LETTER = re.compile(r"[A-Za-z]{3}")


class ServerProcess:
    """`vllm-buddy serve` with its output in `log`. A context manager; leaving it stops every process of the server.

    Raises:
        ServerError: the server ends, or is not healthy within `start_timeout_s`; with the end of its log.
    """

    def __init__(self, arguments: Sequence[str], log: FilePath, start_timeout_s: float = 300.0) -> None:
        self.port = free_port()
        self.start_s = 0.0
        self._command = [sys.executable, "-m", "vllm_buddy", "serve", *arguments]
        self._command += ["--host", HOST, "--port", str(self.port)]
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ServerProcess":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            # Its own session, so that one signal reaches the engine's processes too, and Ctrl-C in the terminal
            # reaches only us.
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_healthy(self, report: Callable[[float, str], None]) -> None:
        """Return when /health answers. report: called twice a second with (seconds so far, gist of the log)."""
        start = time.monotonic()
        while True:
            elapsed = time.monotonic() - start
            self.check_alive()
            if self._healthy():
                self.start_s = elapsed
                return
            if elapsed > self._start_timeout_s:
                raise ServerError(f"the server was not ready after {elapsed:.0f} s\n{self.log_tail()}")
            report(elapsed, self.log_gist())
            time.sleep(_POLL_S)

    def check_alive(self) -> None:
        """Raise ServerError with the end of the log if the server has ended."""
        assert self._process is not None
        status = self._process.poll()
        if status is not None:
            raise ServerError(f"the server ended with status {status}\n{self.log_tail()}")

    def stop(self) -> None:
        """Ask the server to end, then end whatever is left of its process group."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                pass
            except KeyboardInterrupt:
                pass  # a second Ctrl-C: do not wait any longer
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()

    def log_gist(self) -> str:
        """The last thing the server said, without the prefix of its log lines."""
        for line in reversed(self._log_lines()):
            text = _LOG_PREFIX.sub("", line).strip()
            if _LETTER.search(text):
                return shorten(text, 80)
        return ""

    def log_tail(self) -> str:
        """The end of the log, for an error message."""
        lines = self._log_lines()[-_TAIL_LINES:]
        return "\n".join([f"--- end of {self._log} ---", *lines, "---"])

    def _log_lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines() if self._log.is_file() else []

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


def free_port() -> int:
    """A port nothing listens on at this moment."""
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])
