"""The demo's chat client against a stand-in for vLLM's server."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from vllm_buddy.cli.chat_client import ChatClient
from vllm_buddy.errors import ServerError

OUTCOME = {"budget": 0.5, "layers_executed_mean": 15.0}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
TEXT_EVENTS = [{"delta": {"role": "assistant"}}, {"delta": {"content": "Hel"}}, {"delta": {"content": "lo"}}]
# Budgets that make the stand-in break a streamed answer after its text, each in another way.
BREAKS_OFF, FAILS, CLOSES = 0.1, 0.2, 0.3


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    received: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append(body)
        budget = body["vllm_xargs"]["buddy_budget"]
        if budget > 1:
            self._send_json(400, {"error": {"message": "budget is 2.0"}})
        elif body.get("stream"):
            self._send_events(budget)
        else:
            choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "Hello"}}
            self._send_json(200, {"choices": [choice], "usage": USAGE, "kv_transfer_params": {"buddy": OUTCOME}})

    def _send_json(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", **answer}).encode()
        self._send_head(status, "application/json", ("Content-Length", str(len(content))))
        self.wfile.write(content)

    def _send_events(self, budget: float) -> None:
        self._send_head(200, "text/event-stream", ("Transfer-Encoding", "chunked"))
        for choice in TEXT_EVENTS:
            self._send_event({"choices": [{"index": 0, "finish_reason": None, **choice}]})
        if budget == CLOSES:
            self.close_connection = True
            return
        if budget == FAILS:
            self._send_event({"error": {"message": "the engine died", "code": 500}})
        elif budget != BREAKS_OFF:
            last = {"index": 0, "finish_reason": "length", "delta": {}}
            self._send_event({"choices": [last], "kv_transfer_params": {"buddy": OUTCOME}})
            self._send_event({"choices": [], "usage": USAGE})
        self._send_chunk("data: [DONE]\n\n")
        self._send_chunk("")

    def _send_event(self, event: dict[str, Any]) -> None:
        about = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        self._send_chunk(f"data: {json.dumps({**about, **event})}\n\n")

    def _send_chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())

    def _send_head(self, status: int, content_type: str, header: tuple[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header(*header)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def client() -> Iterator[ChatClient]:
    Handler.received = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield ChatClient("127.0.0.1", server.server_port, "m", num_tokens=7)
    server.shutdown()
    server.server_close()


def test_whole_answer_carries_the_outcome(client: ChatClient) -> None:
    """Fails if the demo's table would show layers that the client computed, not those that the engine counted."""
    answer = client.ask("Hi", 0.5)
    assert (answer.text, answer.num_tokens, answer.outcome) == ("Hello", 2, OUTCOME)
    assert answer.tokens_per_s > 0
    assert Handler.received[0]["vllm_xargs"] == {"buddy_budget": 0.5}
    assert Handler.received[0]["max_tokens"] == Handler.received[0]["min_tokens"] == 7
    assert Handler.received[0]["temperature"] == 0


def test_streamed_answer_is_put_together(client: ChatClient) -> None:
    """Fails if the first event, which has no content, or the last, which has no choice, breaks the text, or the outcome
    is lost."""
    answer = client.ask("Hi", 0.5, stream=True)
    assert (answer.text, answer.num_tokens, answer.outcome) == ("Hello", 2, OUTCOME)
    assert Handler.received[0]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("stream", [False, True])
def test_refusal_is_reported(client: ChatClient, stream: bool) -> None:
    """Fails if the user does not see the server's reason, or if a refused request is sent again."""
    with pytest.raises(ServerError, match=r"400.*budget is 2.0"):
        client.ask("Hi", 2.0, stream=stream)
    assert len(Handler.received) == 1


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (BREAKS_OFF, "broke off an answer: the stream ended before"),
        (FAILS, "broke off an answer: .*the engine died"),
        (CLOSES, r"went away during a request \(RemoteProtocolError"),
    ],
)
def test_broken_stream_is_reported(client: ChatClient, budget: float, message: str) -> None:
    """Fails if half an answer counts as an answer."""
    with pytest.raises(ServerError, match=message):
        client.ask("Hi", budget, stream=True)


def test_server_gone() -> None:
    """Fails if a crash of the server is a traceback."""
    with pytest.raises(ServerError, match=r"went away during a request \(ConnectError"):
        ChatClient("127.0.0.1", 1, "m", 7).ask("Hi", 1.0)


def test_proxy_of_the_environment_is_not_used(client: ChatClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a machine behind a proxy cannot reach its own server."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert client.ask("Hi", 0.5).text == "Hello"
