"""A real server, two API servers in front of two engines, with a real Prometheus and a receiver of traces."""

import gzip
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from tests.harness.engine import Tiny
from tests.harness.http_server import NUM_TOKENS, PROMPTS, Server, budget, serving
from tests.serving.telemetry.test_deploy import PROMETHEUS, expressions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not installed; it is in Debian's package of that name"
    ),
]
START_TIMEOUT_S = 900.0  # of five processes
WAIT_S = 60.0
NUM_REQUESTS = 24


class Traces(BaseHTTPRequestHandler):
    """Keeps the attributes of each span that is sent to it, by OTLP over HTTP."""

    received: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    told = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
                    self.received.append({"name": span.name, **told})
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def traces() -> Iterator[str]:
    """Where a server sends traces to."""
    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Traces)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        yield f"http://127.0.0.1:{receiver.server_port}/v1/traces"
    receiver.shutdown()
    receiver.server_close()


@pytest.fixture(scope="module")
def server(tiny: Callable[[str], Tiny], traces: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--api-server-count", "2", "--data-parallel-size", "2", "--otlp-traces-endpoint", traces]
    log_path = tmp_path_factory.mktemp("server") / "log"
    with serving(
        lambda log: Server(tiny("llama"), log, options, ("vllm_buddy", "serve")), log_path, START_TIMEOUT_S
    ) as made:
        yield made


@pytest.fixture(scope="module")
def query(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Asks a Prometheus with our configuration, which scrapes the server once a second."""
    folder = tmp_path_factory.mktemp("prometheus")
    text = (PROMETHEUS / "prometheus.yml").read_text().replace("vllm:8000", server.url.removeprefix("http://"))
    (folder / "prometheus.yml").write_text(re.sub(r"_interval: \d+s", "_interval: 1s", text))
    shutil.copy(PROMETHEUS / "rules.yml", folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["prometheus", *options, f"--web.listen-address={address}"], stdout=log, stderr=subprocess.STDOUT
        )

    def ask(expression: str) -> Any:
        url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(url, timeout=WAIT_S) as response:
            return json.load(response)["data"]["result"]

    try:
        _until(lambda: _value(ask, "min(up)") == 1)
        yield ask
    finally:
        process.terminate()
        process.wait(WAIT_S)


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            if done():
                return
        except OSError:
            pass  # Prometheus is starting
        time.sleep(0.5)
    raise AssertionError(f"not within {WAIT_S:g} s")


def _value(query: Callable[[str], Any], expression: str) -> float | None:
    found = query(expression)
    return float(found[0]["value"][1]) if found else None


def test_requests_are_counted_once_whoever_received_and_ran_them(server: Server, query: Callable[[str], Any]) -> None:
    """Fails if figures of an engine are lost or doubled between two API servers, or engines have one label."""
    assert len(query("vllm_buddy:budget_count")) == 2  # engines, before any request
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda n: server.complete(PROMPTS[n % len(PROMPTS)], budget("0.5")), range(NUM_REQUESTS))
        outcomes = [answer["kv_transfer_params"]["buddy"] for status, answer in answers if status == 200]
    assert len(outcomes) == NUM_REQUESTS
    _until(lambda: _value(query, "sum(vllm_buddy:budget_count)") == NUM_REQUESTS)
    tokens = sum(outcome["tokens"] * outcome["depth"] for outcome in outcomes)
    assert _value(query, "sum(vllm_buddy:layer_tokens_executed_total)") == tokens
    assert _value(query, "count(vllm_buddy:budget_count > 0)") == 2
    labels = [{"engine", "instance", "job", "model_name", "__name__"}] * 2
    for name in ("vllm_buddy:budget_count", "vllm:num_requests_running"):
        assert [set(series["metric"]) for series in query(name)] == labels, name


def test_panels_have_data_and_no_alert_fires(server: Server, query: Callable[[str], Any]) -> None:
    """Fails if an expression of the dashboard is refused by Prometheus, or finds nothing on a server that serves."""

    def has_data(expression: str) -> bool:
        filled = re.sub(r"\$(model|instance|engine)", ".*", expression.replace("$__rate_interval", "1m"))
        return any(series["value"][1] != "NaN" for series in query(filled))

    for _ in range(2):  # a rate needs growth between two scrapes
        for body in (budget("0.5"), '"vllm_xargs": {"buddy_budget": "auto"}'):
            assert server.complete(PROMPTS[0], body, NUM_TOKENS)[0] == 200
        time.sleep(3)
    panels = [(where, text) for where, text in expressions() if where.startswith("panel")]
    empty = {where for where, text in panels if not has_data(text)}
    # The server has no speculator, and no setting slo.
    assert empty == {"panel Drafts accepted", "panel Service objectives"}
    assert query('ALERTS{alertstate="firing"}') == []


def test_the_span_of_a_request_tells_budget_and_depth(server: Server) -> None:
    """Fails if vLLM makes its spans, or sends them, in a way that leaves out what the request ran."""
    status, answer = server.complete(PROMPTS[0], budget("0.75"))
    assert status == 200

    def found() -> list[dict[str, Any]]:
        return [s for s in Traces.received if s["name"] == "llm_request" and s.get("vllm_buddy.budget") == 0.75]

    _until(lambda: bool(found()))
    outcome = answer["kv_transfer_params"]["buddy"]
    (span,) = found()
    assert span["vllm_buddy.depth"] == outcome["depth"]
    assert span["vllm_buddy.layers_executed_mean"] == outcome["layers_executed_mean"]
