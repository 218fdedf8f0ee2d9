"""vLLM's API server on the tiny Llama, over HTTP, in a process of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.harness.engine import BLOCK_SIZE, Tiny
from tests.harness.tiny_models import random_prompts
from vllm_buddy.method import PathSchedule

START_TIMEOUT_S = 240.0  # about 20 s on two idle cores
REQUEST_TIMEOUT_S = 60.0
SCHEDULE = PathSchedule(1)
PROMPTS = [tuple(p) for p in random_prompts(4, seed=71, min_tokens=5, max_tokens=60)]
NUM_TOKENS = 12
LOAD_PRICE = 40.0
# One request that runs is a full load, so it would lower itself.
LOAD = {"load": {"price": LOAD_PRICE, "running": [0, 1], "waiting": [50, 60], "lowers_running": False}}


class Server:
    """vLLM's API server on the tiny Llama, in a process of its own with an engine process behind it.

    options: of vLLM's command line, beside those that all tests need. module: the program; that of the default has one
        API server. variables: more for its environment.
    """

    def __init__(
        self,
        tiny: Tiny,
        log: Any,
        options: Sequence[str] = (),
        module: Sequence[str] = ("vllm.entrypoints.openai.api_server",),
        **variables: str,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        buddy = {"artifact": str(tiny.artifact_folder), "paths": "free", "route_every": SCHEDULE.interval, **LOAD}
        settings = {"buddy": buddy}
        command = [sys.executable, "-m", *module, "--model", str(tiny.folder)]
        command += ["--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1"]
        command += ["--model-impl", "buddy", "--additional-config", json.dumps(settings)]
        command += ["--skip-tokenizer-init", "--enforce-eager", "--dtype", "float32", "--max-model-len", "512"]
        command += ["--block-size", str(BLOCK_SIZE), "--kv-cache-memory-bytes", str(32 << 20), *options]
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **variables}
        self.process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"the server did not come up (exit status {self.process.poll()})")

    def complete(self, prompt: tuple[int, ...], body: str = "", num_tokens: int = NUM_TOKENS) -> tuple[int, Any]:
        """POST /v1/completions with `body`, JSON members, added; returns status and answer."""
        base = f'"model": "tiny", "prompt": {list(prompt)}, "max_tokens": {num_tokens}, "temperature": 0'
        return self.ask(
            "/v1/completions", "{" + base + ', "return_token_ids": true' + (f", {body}" if body else "") + "}"
        )

    def ask(self, path: str, body: str) -> tuple[int, Any]:
        """POST JSON; returns status and answer."""
        request = urllib.request.Request(self.url + path, body.encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stream(self, prompt: tuple[int, ...], body: str) -> list[dict[str, Any]]:
        """POST a streamed completion; returns its chunks, after a look at the end."""
        base = f'"model": "tiny", "prompt": {list(prompt)}, "max_tokens": {NUM_TOKENS}, "temperature": 0'
        text = "{" + base + f', "stream": true, {body}' + "}"
        request = urllib.request.Request(
            f"{self.url}/v1/completions", text.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
            *chunks, done = [line.removeprefix("data: ") for line in response.read().decode().split("\n\n") if line]
        assert done == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]

    def metrics(self, engine: int = 0) -> dict[str, float]:
        """Samples of our families that have vLLM's labels and no other."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=REQUEST_TIMEOUT_S) as response:
            text = response.read().decode()
        labels = rf'\{{engine="{engine}",model_name="tiny"\}}'
        found = re.findall(rf"^(vllm_buddy:\w+){labels} (\S+)$", text, flags=re.MULTILINE)
        assert len(found) == len(dict(found)), "a sample is there twice"
        return {name: float(value) for name, value in found}

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


@contextmanager
def serving(server: Callable[[Any], Server], log_path: Path, timeout_s: float = START_TIMEOUT_S) -> Iterator[Server]:
    """A server that is healthy, and is stopped in the end; a failed test shows the end of its log.

    server: makes it, with the open log.
    """
    with log_path.open("w") as log:
        made = server(log)
        try:
            made.wait(timeout_s)
            yield made
        except AssertionError:
            print(log_path.read_text()[-5000:])
            raise
        finally:
            made.stop()


def budget(value: str) -> str:
    return f'"vllm_xargs": {{"buddy_budget": {value}}}'


def auto(**options: float | str) -> str:
    return f'"vllm_xargs": {json.dumps({"buddy_budget": "auto", **options})}'
