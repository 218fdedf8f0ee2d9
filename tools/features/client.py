"""A client of one server, stock or routed, that sends the same requests to both and checks what a routed one tells."""

import http.client
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from vllm_buddy.method import depth_for_budget

HOST = "127.0.0.1"
TIMEOUT_S = 120.0
MODEL = "model"  # --served-model-name
MAX_MODEL_LEN = 512  # --max-model-len
MAX_NUM_SEQS = 16  # --max-num-seqs
BUDGETS: tuple[float | str, ...] = (1.0, 0.75, "auto")

Prompt = str | Sequence[int] | Sequence[str]


@dataclass(frozen=True)
class Client:
    """Sends requests at one budget. budget: None where the server is stock vLLM. num_layers: of its model."""

    port: int
    budget: float | str | None
    num_layers: int
    vocab_size: int

    # --- requests ----------------------------------------------------------------------------------------------

    def complete(self, prompt: Prompt, *, tells: bool = True, **body: Any) -> Any:
        """The answer of /v1/completions: greedy, 8 tokens, with token ids; `body` adds and replaces members.

        tells: whether the answer must tell the outcome.

        Raises:
            AssertionError: it was refused, or not what the budget asks for was executed.
        """
        status, answer = self.ask("/v1/completions", prompt=prompt, **{"return_token_ids": True, **body})
        assert status == 200, answer
        if tells:
            self.check_outcome(answer)
        return answer

    def chat(self, content: str = "Name a colour.", **body: Any) -> Any:
        """The answer of /v1/chat/completions to one message."""
        messages = [{"role": "user", "content": content}]
        status, answer = self.ask("/v1/chat/completions", **{"messages": messages, **body})
        assert status == 200, answer
        self.check_outcome(answer)
        return answer

    def refusal(self, path: str = "/v1/completions", **body: Any) -> str:
        """The message of the HTTP 400 that answers a request."""
        status, answer = self.ask(path, **body)
        assert status == 400, (status, answer)
        return str(answer["error"]["message"])

    def ask(self, path: str, headers: dict[str, str] | None = None, **body: Any) -> tuple[int, Any]:
        """Post a request at this client's budget; returns status and answer."""
        return self.post(path, self._body(body), headers)

    def post(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Post JSON (or bytes, as they are) as it is; returns status and answer, which may not be JSON."""
        with self.connection() as connection:
            data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
            connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            text = response.read()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text.decode(errors="replace")

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a GET."""
        with self.connection() as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def stream(self, path: str, **body: Any) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer. Closing the iterator closes the connection."""
        with self.connection() as connection:
            data = json.dumps(self._body({"stream": True, **body})).encode()
            connection.request("POST", path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200, response.read()
            for line in response:
                event = line.decode().strip()
                if event.startswith("data: {"):
                    yield json.loads(event.removeprefix("data: "))

    @contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        """A connection to the server, which is closed in the end."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=TIMEOUT_S)
        try:
            yield connection
        finally:
            connection.close()

    def at_once(self, *requests: Callable[[], Any]) -> list[Any]:
        """What the requests return, all sent at the same time."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return [future.result() for future in [pool.submit(request) for request in requests]]

    # --- the server --------------------------------------------------------------------------------------------

    @property
    def routed(self) -> bool:
        """Whether the server is not stock vLLM."""
        return self.budget is not None

    def at(self, budget: float | str) -> "Client":
        """A client at another budget, of the same server. On stock vLLM the same client."""
        return replace(self, budget=budget) if self.routed else self

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = self.get("/metrics")[1]
        return sum(float(v) for v in re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, flags=re.MULTILINE))

    def wait_idle(self, timeout_s: float = 30.0) -> None:
        """Wait until no request runs or waits and the KV cache holds none.

        Raises:
            AssertionError: that does not happen: a request hangs, or its blocks are lost.
        """
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        deadline = time.monotonic() + timeout_s
        while found := {name: value for name in names if (value := self.metric(name))}:
            assert time.monotonic() < deadline, found
            self.complete("tick", max_tokens=1)  # vLLM's gauges are set in a step
            time.sleep(0.1)

    def _body(self, body: dict[str, Any]) -> dict[str, Any]:
        options = dict(body.pop("vllm_xargs", {}))
        if self.routed:
            options = {"buddy_budget": self.budget, **options}
        default: dict[str, Any] = {"model": MODEL, "temperature": 0.0, "max_tokens": 8}
        return {**default, **({"vllm_xargs": options} if options else {}), **body}

    def check_outcome(self, answer: Any) -> None:
        if not self.routed:
            return
        outcome = answer["kv_transfer_params"]["buddy"]
        assert outcome["auto"] == (self.budget == "auto"), outcome
        if self.budget != "auto":
            assert outcome["depth"] == depth_for_budget(float(str(self.budget)), self.num_layers), outcome
        depth = outcome["depth"]
        assert outcome["layers_executed_min"] == outcome["layers_executed_max"] == depth, outcome


def token_ids(answer: Any) -> list[list[int]]:
    """The generated token ids of each choice of a completion."""
    return [choice["token_ids"] for choice in answer["choices"]]


def text_of(answer: Any) -> str:
    """The text of the first choice of a completion or of a chat."""
    choice = answer["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])
