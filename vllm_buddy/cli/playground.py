"""`vllm-buddy playground`: a page that asks a running server at several budgets and lights the layers that run."""

import argparse
import json
import math
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vllm_buddy.cli.page import page
from vllm_buddy.errors import ServerError
from vllm_buddy.serving.admission.option_names import BUDGET_KEY, PATHS_KEY

if TYPE_CHECKING:
    import httpx

BUDGETS = (1.0, 0.75, 0.5)
_POLL_MS = 1000
_STATE_TIMEOUT_S = 5.0  # a busy server answers late
_ANSWER_TIMEOUT_S = 120.0
_MOST_BYTES = 1 << 20  # of a request of the page
# Gauges that the engines of a server have in common, or nearly so.
_SHARES = ("vllm:kv_cache_usage_perc", "vllm_buddy:load", "vllm_buddy:auto_price")
_SAMPLE = re.compile(r"^(vllm(?:_buddy)?:\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://localhost:8000", help="the server (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8001, help="port to listen on (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C. The server at --url need not run yet, and may stop and start again.

    Raises:
        ServerError: the address cannot be listened on, or --url is none.
    """
    with playground(args.url, args.host, args.port) as server:
        here = f"http://{_in_url(args.host)}:{server.server_port}"
        print(f"vllm-buddy: look at {here}, which asks {args.url}; Ctrl-C ends it")
        server.serve_forever()
    return 0


@contextmanager
def playground(url: str, host: str, port: int) -> Iterator[ThreadingHTTPServer]:
    """The playground's own HTTP server, listening. url: of vLLM's server."""
    import httpx

    try:
        scheme = httpx.URL(url).scheme
    except httpx.InvalidURL as error:
        raise ServerError(f"--url {url!r} is no address of a server: {error}") from None
    if scheme not in ("http", "https"):
        raise ServerError(f"--url {url!r} is no address of a server; it begins with http:// or https://")
    key = os.environ.get("VLLM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # Without a proxy from the environment, and one connection per request: the server may go and come back.
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=url, trust_env=False, headers=headers, limits=limits) as upstream:
        handler = type("Handler", (_Handler,), {"url": url, "upstream": upstream, "hosts": _names_of(host)})
        try:
            server = (_IPv6Server if ":" in host else ThreadingHTTPServer)((host, port), handler)
        except (OSError, OverflowError) as error:
            raise ServerError(
                f"cannot listen on {_in_url(host)}:{port}: {error}; choose others with --host and --port"
            ) from None
        with server:
            yield server


class _IPv6Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _names_of(host: str) -> frozenset[str] | None:
    """The names under which a browser may ask for the page; None: any, where it listens on all addresses."""
    return None if host in ("", "0.0.0.0", "::") else frozenset({host.lower(), "localhost", "127.0.0.1", "::1"})


def chat_request(asked: dict[str, Any]) -> dict[str, Any]:
    """The request to vLLM's chat completions API for what the page asks: model, prompt, max_tokens and budget."""
    return {
        "model": asked["model"],
        "messages": [{"role": "user", "content": asked["prompt"]}],
        "max_tokens": asked["max_tokens"],
        "temperature": 0,
        "stream": True,
        "vllm_xargs": {BUDGET_KEY: asked["budget"], PATHS_KEY: True},
    }


class _Handler(BaseHTTPRequestHandler):
    """The page, the state of vLLM's server, and answers as they stream."""

    url: str
    upstream: "httpx.Client"
    hosts: frozenset[str] | None

    def do_GET(self) -> None:
        if not self._is_asked_by_name():
            return
        if self.path == "/":
            content = page("playground", {"url": self.url, "budgets": BUDGETS, "poll_ms": _POLL_MS})
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", content.encode())
        elif self.path == "/api/server":
            self._send_json(HTTPStatus.OK, self._state())
        else:
            self._send_error(HTTPStatus.NOT_FOUND, f"there is nothing at {self.path}")

    def do_POST(self) -> None:
        import httpx

        if not self._is_asked_by_name():
            return
        length = int(self.headers.get("Content-Length") or 0)
        # Other pages cannot send JSON here: their browser asks first, and is not answered.
        if self.path != "/api/ask" or self.headers.get_content_type() != "application/json" or length > _MOST_BYTES:
            self._send_error(HTTPStatus.BAD_REQUEST, "POST JSON of at most 1 MiB to /api/ask")
            return
        try:
            request = chat_request(json.loads(self.rfile.read(length)))
        except (ValueError, KeyError, TypeError) as error:
            self._send_error(HTTPStatus.BAD_REQUEST, f"not a request of the page: {error!r}")
            return
        try:
            with self.upstream.stream(
                "POST", "/v1/chat/completions", json=request, timeout=_ANSWER_TIMEOUT_S
            ) as response:
                if response.status_code != HTTPStatus.OK:
                    self._send(response.status_code, "application/json", response.read())
                    return
                self._pass_on(response)
        except httpx.ConnectError as error:
            self._send_error(HTTPStatus.BAD_GATEWAY, f"no server answers at {self.url} ({error})")
        except (httpx.TransportError, BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # either side went away: a stream without [DONE] tells the page

    def _is_asked_by_name(self) -> bool:
        """Refuse a page of somebody else's whose name leads here (DNS rebinding): to the browser it is of this origin.

        Returns:
            Whether the request may be answered.
        """
        try:
            name = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:
            name = None
        if self.hosts is None or name in self.hosts:
            return True
        self._send_error(HTTPStatus.FORBIDDEN, f"ask for one of {', '.join(sorted(self.hosts))}")
        return False

    def _pass_on(self, response: "httpx.Response") -> None:
        """Send the stream as it comes; its end is that of the connection."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        for part in response.iter_raw():
            self.wfile.write(part)
            self.wfile.flush()

    def _state(self) -> dict[str, Any]:
        """Whether vLLM's server answers, its model, and its metrics.

        Counters and numbers of requests are summed over their labels; of other gauges the largest counts.
        """
        import httpx

        try:
            models = self.upstream.get("/v1/models", timeout=_STATE_TIMEOUT_S).raise_for_status().json()
            samples = self.upstream.get("/metrics", timeout=_STATE_TIMEOUT_S).raise_for_status().text
        except (httpx.HTTPError, ValueError) as error:
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None
            return {"up": False, "model": None, "metrics": None, "status": status}
        metrics: dict[str, float] = {}
        for name, text in _SAMPLE.findall(samples):
            value = float(text)
            if not math.isfinite(value):  # nothing was observed, which JSON cannot say
                continue
            metrics[name] = max(metrics.get(name, value), value) if name in _SHARES else metrics.get(name, 0.0) + value
        return {"up": True, "model": models["data"][0]["id"], "metrics": metrics}

    def _send_error(self, status: int, message: str) -> None:
        self._send_json(status, {"error": {"message": message}})

    def _send_json(self, status: int, content: Any) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _send(self, status: int, content_type: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing: the page polls once a second."""
