"""Tests a benchmark's requests to a server, and which answers end it. The server is a stand-in with fixed answers."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch

from benchmarks.harness import servers
from benchmarks.harness.reference_check import Routing
from benchmarks.harness.rounds import Refused
from benchmarks.harness.servers import SERVED_NAME, Server, start_server
from vllm_buddy.cli.server_process import HOST, free_port
from vllm_buddy.errors import ServerError

Reply = tuple[int, dict[str, Any]]
STOCK = Routing(name="stock", layers=8)
BUDDY = Routing(name="buddy 0.5", layers=4, budget=0.5)


class FakeServer:
    """Answers each request with the next of `replies`, repeats the last one, and keeps the requests."""

    def __init__(self) -> None:
        self.replies: list[Reply] = [(200, {})]
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.alive = True

    def check_alive(self) -> None:
        if not self.alive:
            raise ServerError("the server ended with status 1")

    def answer(self, path: str, body: bytes) -> Reply:
        self.asked.append((path, json.loads(body or b"{}")))
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    def as_server(self, port: int) -> Server:
        process: Any = SimpleNamespace(port=port, check_alive=self.check_alive)
        return Server("fake", process, Path("model"))


@pytest.fixture
def fake() -> FakeServer:
    return FakeServer()


@pytest.fixture
def server(fake: FakeServer) -> Iterator[Server]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, reply = fake.answer(self.path, self.rfile.read(int(self.headers.get("Content-Length", 0))))
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer((HOST, 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield fake.as_server(listening.server_address[1])
        listening.shutdown()
        thread.join()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_RESET_TIMEOUT_S", 0.05)
    monkeypatch.setattr(servers, "_RESET_POLL_S", 0.01)


def completion(*steps: dict[str, float]) -> dict[str, Any]:
    """Return vLLM's form of an answer with return_tokens_as_token_ids."""
    named = [{f"token_id:{token}": value for token, value in step.items()} for step in steps]
    return {"choices": [{"logprobs": {"top_logprobs": named}}]}


def test_an_error_is_no_answer(fake: FakeServer, server: Server) -> None:
    """Fails if a request that the server refuses counts as served, or the reason is lost."""
    fake.replies = [(400, {"error": "budget 7 is not in (0, 1]"})]
    with pytest.raises(Refused, match=r"server 'fake' answers 400 to /v1/completions: .*budget 7"):
        server.second_token_logprobs([(BUDDY, [1, 2])])
    with pytest.raises(Refused, match="answers 400 to /reset_prefix_cache"):
        server.reset_prefix_cache()


def test_logprobs_are_those_of_the_second_token_by_id(fake: FakeServer, server: Server) -> None:
    """Fails if the check reads the step whose token is forced, or mistakes one token's id for another."""
    fake.replies = [(200, completion({"5": -9.0}, {"17": -0.5, "203": -1.25}))]
    assert server.second_token_logprobs([(STOCK, [3, 5])]) == [{17: -0.5, 203: -1.25}]
    [(path, body)] = fake.asked
    assert path == "/v1/completions"
    assert body["model"] == SERVED_NAME
    assert body["prompt"] == [3, 5]
    assert body["max_tokens"] == 2
    assert body["logit_bias"] == {"5": 100.0}
    assert "vllm_xargs" not in body


def test_every_request_says_its_budget(fake: FakeServer, server: Server) -> None:
    """Fails if requests of several budgets are checked at the server's default."""
    fake.replies = [(200, completion({}, {"1": -0.5}))]
    quarter = Routing(name="buddy 0.25", layers=2, budget=0.25)
    server.second_token_logprobs([(BUDDY, [1, 2]), (quarter, [3, 4])])
    budgets = {tuple(body["prompt"]): body["vllm_xargs"]["buddy_budget"] for _, body in fake.asked}
    assert budgets == {(1, 2): 0.5, (3, 4): 0.25}


def test_a_cache_that_is_not_emptied_gives_no_figure(fake: FakeServer, server: Server, impatient: None) -> None:
    """Fails if a run finds the prompts of another in the cache: vLLM answers 200 even if the reset did not succeed."""
    fake.replies = [(200, {"success": False})]
    with pytest.raises(Refused, match="server 'fake' has not emptied its prefix cache"):
        server.reset_prefix_cache()


def test_emptying_is_tried_again(fake: FakeServer, server: Server) -> None:
    """Fails if the benchmark ends because the last request has not given back its blocks yet."""
    fake.replies = [(200, {"success": False}), (200, {"success": False}), (200, {"success": True})]
    server.reset_prefix_cache()
    assert [path for path, _ in fake.asked] == ["/reset_prefix_cache"] * 3


def test_vllm_says_whether_it_emptied_the_cache() -> None:
    """Fails if vLLM's answer has another form than the one that the harness reads."""
    import asyncio

    from vllm.entrypoints.serve.dev.cache.api_router import reset_prefix_cache

    async def reset(*_: object) -> bool:
        return False

    client = SimpleNamespace(reset_prefix_cache=reset)
    request: Any = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(engine_client=client)))
    assert json.loads(asyncio.run(reset_prefix_cache(request, False, False)).body) == {"success": False}


def test_no_answer_says_whether_the_server_lives(fake: FakeServer) -> None:
    """Fails if a dead server is reported as a network error, or a live one that does not answer as dead."""
    unreachable = fake.as_server(free_port())
    with pytest.raises(Refused, match="server 'fake' does not answer"):
        unreachable.reset_prefix_cache()
    fake.alive = False
    with pytest.raises(Refused, match="server 'fake': the server ended with status 1"):
        unreachable.reset_prefix_cache()


def test_servers_compute_in_the_dtype_of_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the checkpoint's own dtype decides: reference and server would then round the weights differently."""
    for name in ("VLLM_SERVER_DEV_MODE", "VLLM_USE_AOT_COMPILE"):
        monkeypatch.setenv(name, "0")  # restored afterwards
    command = start_server("stock", tmp_path, tmp_path, ["--model-impl", "auto"])._command
    assert command[command.index("--dtype") + 1] == servers.DTYPE
    assert isinstance(getattr(torch, servers.DTYPE), torch.dtype)
