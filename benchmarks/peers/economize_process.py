"""Installs economize apart from the environment, starts it in its own process and sends it requests."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.rounds import Refused

VERSION = "0.3.2"
REQUIREMENT = f"economize=={VERSION}"
ROOT = Path(__file__).parents[2]
LOOP_MODULE = "benchmarks.peers.economize_loop"
REPLY_TIMEOUT_S = 900.0  # the search of layer_skip takes the longest


def install(folder: Path) -> Path:
    """Install economize with pip, without its dependencies, into `folder` and return `folder`.

    In the environment itself, vLLM would load its plugin into every engine.

    Raises:
        Refused: pip cannot install it.
    """
    command = ["install", "--no-deps", "--quiet", "--target"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command, str(folder), REQUIREMENT], capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Refused(
            f"pip cannot get {REQUIREMENT}: {reason}. Where there is a network, run "
            f"`pip {' '.join(command)} DIR {REQUIREMENT}`, and give DIR here with --economize"
        )
    return folder


class LoopProcess:
    """A process that answers a line of JSON with a line of JSON. Use it as a context."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> None:
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env
            )

    def ask(self, do: str, timeout_s: float = REPLY_TIMEOUT_S, **request: Any) -> dict[str, Any]:
        """Send a request and return the reply.

        Raises:
            Refused: the reply is an error or does not arrive in time, or the process is dead.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._refused(do) from None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            raise Refused(f"economize's process has not answered '{do}' in {timeout_s:.0f} s")
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._refused(do)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise Refused(f"economize's process cannot '{do}' {request.get('loop', '')}: {reply['error']}")
        return reply

    def _refused(self, do: str) -> Refused:
        status = self._process.wait()
        end = self._log.read_text(errors="replace").strip().splitlines()[-5:]
        return Refused("\n".join([f"economize's process died with status {status} when asked to '{do}':", *end]))

    def __enter__(self) -> "LoopProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def started(model: Path, site: Path, work: Path, threads: int) -> Iterator[LoopProcess]:
    """Start the process with all loops of economize and transformers, before vLLM binds this process to cores.

    site: folder with economize. Between two requests the process waits in a read and its OpenMP threads soon stop
    spinning, so it does not slow down what is measured meanwhile.

    Raises:
        Refused: the process does not start, has another version, or may use fewer threads or cores than asked.
    """
    path = os.pathsep.join(part for part in (str(site), str(ROOT), os.environ.get("PYTHONPATH")) if part)
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "VLLM_PLUGINS": "",
        "KMP_BLOCKTIME": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", LOOP_MODULE, str(model), "--threads", str(threads)]
    with LoopProcess(command, work / "economize.log", env) as process:
        about = process.ask("about")
        if about["versions"]["economize"] != VERSION:
            raise Refused(f"{site} has economize {about['versions']['economize']}; what is compared here is {VERSION}")
        if about["threads"] != threads or about["cores"] < threads:
            raise Refused(
                f"economize's process has {about['threads']} threads on {about['cores']} cores, not {threads} as vLLM"
            )
        yield process
