"""Starts vLLM servers side by side and sends them the HTTP requests that a benchmark needs."""

import http.client
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.reference_check import NUM_LIKELIEST, Routing
from benchmarks.harness.rounds import Refused
from vllm_buddy.cli.server_process import HOST, ServerProcess
from vllm_buddy.errors import ServerError

SERVED_NAME = "model"  # of every model on every server
DTYPE = "bfloat16"  # of all servers, whatever the checkpoint's dtype; the reference rounds its weights to it
START_TIMEOUT_S = 600.0
_TIMEOUT_S = 120.0
_RESET_TIMEOUT_S = 5.0  # earlier requests have been answered, but the server may not have freed their blocks yet
_RESET_POLL_S = 0.1


@dataclass(frozen=True)
class Server:
    """A running server. model_dir: folder of the model that it serves, for the tokenizer."""

    name: str
    process: ServerProcess
    model_dir: Path

    def check_alive(self) -> None:
        """Raise Refused, with the end of its log, if it has died."""
        try:
            self.process.check_alive()
        except ServerError as error:
            raise Refused(f"server '{self.name}': {error}; nothing is said about it") from None

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache, so that a run finds only its own prompts.

        Raises:
            Refused: the server keeps answering that it could not, as it does while a request holds blocks.
        """
        end = time.monotonic() + _RESET_TIMEOUT_S
        while not json.loads(self._post("/reset_prefix_cache", None))["success"]:
            if time.monotonic() > end:
                raise Refused(
                    f"server '{self.name}' has not emptied its prefix cache in {_RESET_TIMEOUT_S:g} s, as if requests "
                    "were still running; a run would find the prompts of another"
                )
            time.sleep(_RESET_POLL_S)

    def second_token_logprobs(self, asked: Sequence[tuple[Routing, list[int]]]) -> list[dict[int, float]]:
        """Return the likeliest tokens and their logprobs of the first decode step after each prompt.

        The token before it is forced to be the prompt's last token again. asked: prompts, each with its variant. All
        are sent at once, so that requests of several variants run in the same steps.
        """
        with ThreadPoolExecutor(len(asked)) as threads:
            return list(threads.map(lambda one: self._second_token_logprobs(*one), asked))

    def _second_token_logprobs(self, variant: Routing, prompt: list[int]) -> dict[int, float]:
        answer = self._post(
            "/v1/completions",
            {
                "model": SERVED_NAME,
                "prompt": prompt,
                "temperature": 0,
                "max_tokens": 2,
                "ignore_eos": True,
                "logprobs": NUM_LIKELIEST,
                "return_tokens_as_token_ids": True,
                "logit_bias": {str(prompt[-1]): 100.0},
                **request_fields(variant.budget),
            },
        )
        likeliest: Mapping[str, float] = json.loads(answer)["choices"][0]["logprobs"]["top_logprobs"][1]
        return {int(name.removeprefix("token_id:")): value for name, value in likeliest.items()}

    def get(self, path: str) -> bytes:
        """Return the answer to a GET request. Raises Refused if the status is not 200."""
        return self._ask("GET", path, None)

    def _post(self, path: str, body: dict[str, Any] | None) -> bytes:
        return self._ask("POST", path, None if body is None else json.dumps(body))

    def _ask(self, method: str, path: str, content: str | None) -> bytes:
        connection = http.client.HTTPConnection(HOST, self.process.port, timeout=_TIMEOUT_S)
        try:
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
        except OSError as error:
            self.check_alive()
            raise Refused(f"server '{self.name}' does not answer: {error}") from None
        finally:
            connection.close()
        if response.status != 200:
            raise Refused(
                f"server '{self.name}' answers {response.status} to {path}: {answer.decode(errors='replace')}"
            )
        return answer


def request_fields(budget: float | None) -> dict[str, Any]:
    """Return the fields that a request needs to set its budget; none for stock vLLM."""
    return {} if budget is None else {"vllm_xargs": {"buddy_budget": budget}}


def start_server(name: str, model_dir: Path, log: Path, options: Sequence[str]) -> ServerProcess:
    """Make a server process with the settings that everything compared shares. Enter it as a context."""
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # for /reset_prefix_cache
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")  # see benchmarks/harness/engines.py
    shared = ["--served-model-name", SERVED_NAME, "--dtype", DTYPE, "--max-model-len", "2048", "--max-num-seqs", "64"]
    shared += ["--kv-cache-memory-bytes", str(1 << 30), "--disable-uvicorn-access-log"]
    return ServerProcess([str(model_dir), *shared, *options], log / f"{name}.log", START_TIMEOUT_S)
