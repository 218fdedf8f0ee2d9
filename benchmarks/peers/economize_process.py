"""economize's process: how it is installed apart from everything else, started and asked."""

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
REPLY_TIMEOUT_S = 900.0  # the search of layer_skip takes longest


def install(folder: Path) -> Path:
    """Have pip put economize, without its dependencies, into `folder`; returns `folder`.

    It is kept out of the environment, where vLLM would load its plugin into every engine.

    Raises:
        Refused: pip cannot get it.
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
    """A process that answers a line of JSON with a line of JSON. To be used as a context."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> None:
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env
            )

    def ask(self, do: str, timeout_s: float = REPLY_TIMEOUT_S, **request: Any) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            Refused: it is an error, it does not come in time, or the process is dead.
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
    """The process with all loops of economize and transformers. To be started before vLLM binds this one to cores.

    site: where economize is. The process waits in a read between two requests, and its OpenMP threads stop spinning
    soon, so that it costs those who are measured meanwhile nothing.

    Raises:
        Refused: it does not start, is another version, or may use less of the machine than is asked.
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
