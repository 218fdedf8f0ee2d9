"""Starting and stopping a server, tried with a stand-in for vLLM's server."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from vllm_buddy.cli.server_process import ServerProcess
from vllm_buddy.errors import ServerError

# Answers /health, and has a child that ignores SIGTERM, like an engine that hangs.
HEALTHY = """
import http.server, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"],
    stdout=subprocess.PIPE)
child.stdout.readline()
print("(EngineCore pid=12) INFO 11-22 07:05:36 [core.py:120] Starting to load model /m...", flush=True)
print("████", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""
DYING = "import sys; print('Traceback'); print('vllm-buddy: error: the reason'); sys.exit(3)"
HANGING = "import time; print('still loading', flush=True); time.sleep(600)"


def server(script: str, folder: Path, start_timeout_s: float = 30.0) -> ServerProcess:
    return ServerProcess([], folder / "logs" / "server.log", start_timeout_s, program=(sys.executable, "-c", script))


def running(group: int) -> list[int]:
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found


def test_no_process_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an engine outlives the demo and keeps its memory."""
    monkeypatch.setattr("vllm_buddy.cli.server_process._SERVER_STOP_S", 1.0)
    monkeypatch.setattr("vllm_buddy.cli.server_process._GROUP_STOP_S", 1.0)
    with server(HEALTHY, tmp_path) as started:
        started.wait_until_healthy(lambda elapsed, phase: None)
        group = started._process.pid
        assert len(running(group)) == 2
        assert started.start_s > 0
        assert started.phase() == "loading the weights"
    assert running(group) == []


def test_ctrl_c_stops_the_server(tmp_path: Path) -> None:
    """Fails if Ctrl-C does not stop the server, which the terminal cannot signal because it has its own session."""
    # A shell ignores SIGINT in processes that it runs in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), server(HANGING, tmp_path) as started:
        group = started._process.pid
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    signal.signal(signal.SIGINT, before)
    assert running(group) == []


def test_the_error_has_the_plugins_reason_and_names_the_log(tmp_path: Path) -> None:
    """Fails if a user is not told why a server does not start, or is shown its log instead of where it is."""
    with server(DYING, tmp_path) as started, pytest.raises(ServerError) as error:
        started.wait_until_healthy(lambda elapsed, phase: None)
    assert str(error.value) == f"the server ended with status 3: the reason; its log is {tmp_path}/logs/server.log"


def test_start_has_a_time_limit(tmp_path: Path) -> None:
    """Fails if a server that hangs at its start is waited for without limit."""
    seen: list[str] = []
    with server(HANGING, tmp_path, start_timeout_s=1.5) as started, pytest.raises(ServerError, match="not ready"):
        started.wait_until_healthy(lambda elapsed, phase: seen.append(phase))
    assert seen
    assert set(seen) == {""}


def test_a_key_of_the_environment_is_not_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the demo's own server asks for a key that the demo does not send."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    script = "import os; print('key', os.environ.get('VLLM_API_KEY')); print('home', 'PATH' in os.environ)"
    with server(script, tmp_path) as started:
        assert started._process is not None
        started._process.wait(60)
    assert (tmp_path / "logs" / "server.log").read_text() == "key None\nhome True\n"


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """Fails if a folder in the place of the log ends in a traceback."""
    (tmp_path / "logs" / "server.log").mkdir(parents=True)
    with pytest.raises(ServerError, match="cannot write the server's log"), server(HANGING, tmp_path):
        pass
