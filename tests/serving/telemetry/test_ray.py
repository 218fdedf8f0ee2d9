"""The metrics among Ray's, where vLLM's own are: under Ray Serve each replica is scraped by way of its node."""

import socket
import time
import urllib.request
from collections.abc import Callable

import pytest

from tests.harness.engine import Ask, Tiny
from tests.harness.pretend_worker import PretendEngine
from tests.harness.shown_metrics import received
from vllm_buddy.method import PathSchedule

WAIT_S = 120.0


@pytest.mark.slow
def test_a_node_of_ray_shows_them(tiny: Callable[[str], Tiny]) -> None:
    """Fails if Ray refuses a name, a label or a bucket, or a figure stays in the registry of prometheus_client."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
