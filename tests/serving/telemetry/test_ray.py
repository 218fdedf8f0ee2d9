"""The metrics among Ray's, where vLLM's own are: under Ray Serve each replica is scraped by way of its node."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.engine import Ask, Tiny
from tests.harness.pretend_worker import PretendEngine
from tests.harness.shown_metrics import received
from vllm_buddy.method import PathSchedule

WAIT_S = 120.0
EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
# The example with one replica and without compilation; prints what the node shows after its requests.
_SERVE = """
import json, sys, time

import ray_serve
from ray import init, serve
from ray.serve.llm import build_openai_app

from tests.serving.telemetry.test_ray import WAIT_S, _shown

port, metrics_port = map(int, sys.argv[1:])
ray_serve.REPLICAS = 1
config = ray_serve.config()
config.engine_kwargs["enforce_eager"] = True
init("local", num_cpus=6, _metrics_export_port=metrics_port)
serve.start(http_options={"port": port})
serve.run(build_openai_app({"llm_configs": [config]}))
for number in range(6):
    ray_serve.ask(port, number)
deadline, shown = time.monotonic() + WAIT_S, {}
while shown.get("budget_count") != 6 and time.monotonic() < deadline:
    time.sleep(1)
    shown = _shown(metrics_port)
print("SHOWN " + json.dumps(shown), flush=True)
serve.shutdown()
"""


@pytest.mark.slow
def test_a_node_of_ray_shows_them(tiny: Callable[[str], Tiny]) -> None:
    """Fails if Ray refuses a name, a label or a bucket, or a figure stays in the registry of prometheus_client."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

    port = _free_port()
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20, _metrics_export_port=port)
    try:
        engine = PretendEngine(tiny("llama"), PathSchedule(0), asynchronous=False, num_blocks=200, chunk=64)
        manager = StatLoggerManager(engine.config, [0], [RayPrometheusStatLogger])
        for budget in (0.5, 1.0):
            engine.add(Ask(tuple(range(1, 50)), budget, 4))
        while not engine.idle:
            engine.step()
        for stats in engine.stats:
            manager.record(received(stats), None, engine_idx=0)
        deadline, shown = time.monotonic() + WAIT_S, {}
        while "budget_count" not in shown and time.monotonic() < deadline:
            time.sleep(1)
            shown = _shown(port)
        assert shown["budget_count"] == 2
        assert shown["prompt_tokens_total"] == 2 * 49
        assert shown["auto_price"] > 0
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_replica_of_ray_serve_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the front end in a replica makes no metrics of Ray's, or its engine's figures do not reach them."""
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: Ray's sockets lie in it
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*sys.path, str(EXAMPLES)]))
        done = subprocess.run(
            [sys.executable, "-c", _SERVE, str(_free_port()), str(_free_port())],
            cwd=EXAMPLES.parent,
            capture_output=True,
            text=True,
            timeout=1700,
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("SHOWN "))
    shown = json.loads(line.removeprefix("SHOWN "))
    assert shown["budget_count"] == shown["layers_executed_count"] == 6
    # Ray counts an observation of a histogram as the middle of its bucket.
    assert shown["budget_sum"] == pytest.approx(3 * (0.45 + 0.95))
    assert shown["layers_executed_sum"] == pytest.approx(3 * (14.5 + 29.5))
    assert shown["prompt_tokens_total"] > 0
    assert shown["layer_tokens_skipped_total"] == pytest.approx(shown["layer_tokens_executed_total"] / 3)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _shown(port: int) -> dict[str, float]:
    """Our samples on a node's /metrics, without Ray's prefix, added up over labels."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
    except OSError:
        return {}  # the node's agent is starting
    shown: dict[str, float] = {}
    for line in lines:
        if line.startswith("ray_vllm_buddy_"):
            name = line.split("{")[0].removeprefix("ray_vllm_buddy_")
            shown[name] = shown.get(name, 0.0) + float(line.split()[-1])
    return shown
