"""The playground's server, against a stand-in for vLLM's."""

import argparse
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import httpx
import pytest

from vllm_buddy.cli.playground import playground, run
from vllm_buddy.errors import ServerError

EVENTS = 'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\ndata: [DONE]\n\n'
METRICS = """# HELP vllm_buddy:load x
vllm_buddy:load{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="0"} 0.8
vllm:kv_cache_usage_perc{engine="1"} 0.9
vllm_buddy:slo_observed_seconds{engine="0"} nan
vllm:generation_tokens_total{engine="0",model_name="m"} 3.0
vllm:generation_tokens_total{engine="1",model_name="m"} 4.0
python_info{x="1"} 1.0
"""
ASKED = {"model": "m", "prompt": "Hello", "max_tokens": 4, "budget": 0.5}


class Handler(BaseHTTPRequestHandler):
    received: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "m"}]}) if self.path == "/v1/models" else METRICS)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append(body)
        if body["vllm_xargs"]["buddy_budget"] == 2:
            self._send(400, json.dumps({"error": {"message": "budget is 2"}}))
        else:
            self._send(200, EVENTS)

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def url() -> Iterator[str]:
    """The address of a playground whose server answers."""
    Handler.received = []
    with (
        serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as upstream,
        playground(upstream, "127.0.0.1", 0) as server,
        serving(server) as url,
    ):
        yield url


@pytest.fixture
def without_server() -> Iterator[str]:
    """The address of a playground with no server behind it."""
    with playground("http://127.0.0.1:1", "127.0.0.1", 0) as server, serving(server) as url:
        yield url


def test_the_page_needs_nothing_else(url: str) -> None:
    """Fails if the page loads something from elsewhere or a placeholder stays in it."""
    answer = httpx.get(url, trust_env=False)
    assert answer.headers["content-type"].startswith("text/html")
    assert "/* strip.js */" not in answer.text
    assert 'src="' not in answer.text
    assert '"budgets": [1.0, 0.75, 0.5]' in answer.text


def test_metrics_are_summed_over_engines(url: str) -> None:
    """Fails if the state lacks the model, a metric of several engines shows one of them, shares add up to more than
    all, or what was not observed yet makes it text that browsers cannot read."""
    answer = httpx.get(f"{url}/api/server", trust_env=False).text
    state = json.loads(answer, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    metrics = {"vllm_buddy:load": 0.5, "vllm:generation_tokens_total": 7.0, "vllm:kv_cache_usage_perc": 0.9}
    assert state == {"up": True, "model": "m", "metrics": metrics}


def test_a_server_that_wants_a_key_is_not_said_to_be_down(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Fails if a reader looks for a server that is there."""
    monkeypatch.setattr(Handler, "do_GET", lambda self: self._send(401, "{}"))
    state = httpx.get(f"{url}/api/server", trust_env=False).json()
    assert (state["up"], state["status"]) == (False, 401)


def test_an_answer_passes_through_with_budget_and_paths(url: str) -> None:
    """Fails if the stream is changed on its way, or the server is not asked for the paths."""
    answer = httpx.post(f"{url}/api/ask", json=ASKED, trust_env=False)
    assert answer.text == EVENTS
    assert Handler.received[0]["vllm_xargs"] == {"buddy_budget": 0.5, "buddy_paths": True}
    assert Handler.received[0]["messages"] == [{"role": "user", "content": "Hello"}]


def test_a_refusal_passes_through(url: str) -> None:
    """Fails if the reader does not see the server's reason."""
    answer = httpx.post(f"{url}/api/ask", json={**ASKED, "budget": 2}, trust_env=False)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "budget is 2"


@pytest.mark.parametrize("content", [b"no JSON", b"{}", b"[]"])
def test_what_is_no_request_is_refused(url: str, content: bytes) -> None:
    """Fails if nonsense reaches the server or ends the playground."""
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/api/ask", content=content, headers=headers, trust_env=False)
    assert answer.status_code == 400
    assert Handler.received == []


def test_another_pages_form_is_refused(url: str) -> None:
    """Fails if any page that the reader has open can make the server work."""
    answer = httpx.post(f"{url}/api/ask", content=json.dumps(ASKED), trust_env=False)
    assert answer.status_code == 400
    assert Handler.received == []


@pytest.mark.parametrize("host", ["evil.example:8001", "127.0.0.1.evil.example", "[", ""])
def test_a_page_whose_name_was_made_to_lead_here_is_refused(url: str, host: str) -> None:
    """Fails if a foreign page can use the server, and its key, by DNS rebinding: its browser takes it for our page."""
    answer = httpx.post(f"{url}/api/ask", json=ASKED, headers={"Host": host}, trust_env=False)
    assert answer.status_code == 403
    for path in ("/", "/api/server"):
        assert httpx.get(f"{url}{path}", headers={"Host": host}, trust_env=False).status_code == 403
    assert Handler.received == []
    for name in ("localhost:8001", "LOCALHOST", "[::1]:8001"):
        assert httpx.get(url, headers={"Host": name}, trust_env=False).status_code == 200


def test_on_all_addresses_it_answers_to_all_names() -> None:
    """Fails if --host 0.0.0.0 cannot be reached by the name of the machine."""
    with playground("http://127.0.0.1:1", "0.0.0.0", 0) as server, serving(server) as url:
        assert httpx.get(url, headers={"Host": "machine.example"}, trust_env=False).status_code == 200


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_it_listens_on_an_address_of_ipv6(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if --host ::1 is an address that cannot be listened on, or the address that is printed is none."""
    with playground("http://127.0.0.1:1", "::1", 0) as server, serving(server):
        answer = httpx.get(f"http://[::1]:{server.server_port}", trust_env=False)
    assert answer.status_code == 200
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", lambda self: None)
    run(argparse.Namespace(url="http://127.0.0.1:1", host="::1", port=0))
    assert "look at http://[::1]:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "port", "message"),
    [
        ("http://x", 99999, "choose others with --host and --port"),
        ("http://localhost:80a", 0, "is no address of a server"),
        ("localhost:8000", 0, "begins with http:// or https://"),
    ],
)
def test_addresses_that_are_none_are_one_line(url: str, port: int, message: str) -> None:
    """Fails if a slip of the keyboard ends in a traceback, or a playground that never reaches a server."""
    with pytest.raises(ServerError, match=message), playground(url, "127.0.0.1", port):
        pass


def test_a_server_that_is_not_there_is_said_to_be_down(without_server: str) -> None:
    """Fails if the playground ends, or hides that nothing answers."""
    assert httpx.get(f"{without_server}/api/server", trust_env=False).json()["up"] is False
    answer = httpx.post(f"{without_server}/api/ask", json=ASKED, trust_env=False)
    assert answer.status_code == 502
    assert "no server answers" in answer.json()["error"]["message"]


def test_a_port_in_use_is_one_line(url: str) -> None:
    """Fails if a second playground ends in a traceback."""
    port = int(url.rsplit(":", 1)[1])
    with pytest.raises(ServerError, match="choose others"), playground("http://x", "127.0.0.1", port):
        pass
