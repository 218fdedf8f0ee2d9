"""The demo's client against a stand-in for the server."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from vllm_buddy.cli.chat_client import ChatClient
from vllm_buddy.errors import ServerError

OUTCOME = {"budget": 0.5, "layers_executed_mean": 15.0}


class Handler(BaseHTTPRequestHandler):
    received: ClassVar[list[dict]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append(body)
        if body["vllm_xargs"]["buddy_budget"] > 1:
            self._answer(400, json.dumps({"error": {"message": "budget is 2.0"}}))
        elif body.get("stream"):
            events = [{"choices": [{"delta": {"role": "assistant"}}]}]
            events += [{"choices": [{"delta": {"content": text}}]} for text in ("Hel", "lo")]
            events += [{"choices": [], "usage": {"completion_tokens": 2}}]
            self._answer(200, "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n")
        else:
            answer = {"choices": [{"message": {"content": "Hello"}}], "usage": {"completion_tokens": 2}}
            self._answer(200, json.dumps({**answer, "kv_transfer_params": {"buddy": OUTCOME}}))

    def _answer(self, status: int, content: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content.encode())

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
    """The layers in the demo's table are those the engine counted, not those the client computes."""
    answer = client.ask("Hi", 0.5)
    assert (answer.text, answer.num_tokens, answer.outcome) == ("Hello", 2, OUTCOME)
    assert answer.tokens_per_s > 0
    assert Handler.received[0]["vllm_xargs"] == {"buddy_budget": 0.5}
    assert Handler.received[0]["max_tokens"] == Handler.received[0]["min_tokens"] == 7


def test_streamed_answer_is_put_together(client: ChatClient) -> None:
    """The first event has no content and the last no choice; neither may break the text."""
    answer = client.ask("Hi", 0.5, stream=True)
    assert (answer.text, answer.num_tokens, answer.outcome) == ("Hello", 2, None)


def test_refusal_is_reported(client: ChatClient) -> None:
    """The server's reason must reach the user."""
    with pytest.raises(ServerError, match=r"400.*budget is 2.0"):
        client.ask("Hi", 2.0)


def test_server_gone() -> None:
    """A crash of the server in the middle is an error of one line."""
    with pytest.raises(ServerError, match="went away"):
        ChatClient("127.0.0.1", 1, "m", 7).ask("Hi", 1.0)
