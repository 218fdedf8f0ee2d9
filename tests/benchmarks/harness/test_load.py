"""Tests runs of `vllm bench serve` with a budget per request, and the figures computed from them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from benchmarks.harness import load
from benchmarks.harness.load import WORKLOADS, Load, class_latencies
from benchmarks.harness.rounds import Refused
from benchmarks.speed import serving


def _result(num_requests: int, num_tokens: int = 64) -> dict[str, Any]:
    return {
        "completed": num_requests,
        "output_throughput": 100.0,
        "request_goodput": 1.0,
        "output_lens": [num_tokens] * num_requests,
        "ttfts": [0.1 * (i + 1) for i in range(num_requests)],
        "itls": [[0.001 * (i + 1)] * (num_tokens - 1) for i in range(num_requests)],
        "errors": [""] * num_requests,
        **dict.fromkeys(load.LATENCIES, 1.0),
    }


def test_latencies_of_a_class_are_its_own() -> None:
    """Fails if a class of a mixed run is charged with the requests of another."""
    found = class_latencies(_result(6), range(1, 6, 3))
    assert found["p50_ttft_ms"] == pytest.approx(350)  # of requests 1 and 4: 200 and 500
    assert found["p50_tpot_ms"] == pytest.approx(3.5)
    assert found["p99_itl_ms"] == pytest.approx(5)


def test_all_at_once_and_at_a_rate() -> None:
    """Fails if the number of requests does not follow from the rate and the time."""
    assert Load(WORKLOADS[0], 4, 10, 48).num_requests == 40
    assert Load(WORKLOADS[0], float("inf"), 10, 48).num_requests == 48
    assert Load(WORKLOADS[0], float("inf"), 10, 48).row["rate"] == "inf"  # JSON has no infinity


class _Server:
    """Stands in for a server that runs until it dies."""

    name = "fake"
    model_dir = Path("model")
    process = SimpleNamespace(port=1)

    def __init__(self) -> None:
        self.alive, self.resets = True, 0

    def check_alive(self) -> None:
        if not self.alive:
            raise Refused("server 'fake' has died")

    def reset_prefix_cache(self) -> None:
        self.resets += 1


def _served(server: _Server, budgets: tuple[float, ...] = ()) -> serving.Served:
    return serving.Served("fake", server, budgets)  # type: ignore[arg-type]


def test_failed_requests_give_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run in which requests failed, or ended early, is reported as a fast one."""
    of = Load(WORKLOADS[0], 4, 2, 8)
    monkeypatch.setattr(serving, "bench_serve", lambda options, budgets: {**_result(8), "completed": 7})
    with pytest.raises(Refused, match="7 of 8 requests finished"):
        serving.run(_served(_Server()), of, 0, "ttft:1")
    monkeypatch.setattr(serving, "bench_serve", lambda options, budgets: _result(8, num_tokens=63))
    with pytest.raises(Refused, match="504 of 512 tokens"):
        serving.run(_served(_Server()), of, 0, "ttft:1")


def test_dead_server_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a server that dies during a run leaves figures behind."""
    server = _Server()

    def die(options: Any, budgets: Any) -> dict[str, Any]:
        server.alive = False
        return _result(8)

    monkeypatch.setattr(serving, "bench_serve", die)
    with pytest.raises(Refused, match="has died"):
        serving.run(_served(server), Load(WORKLOADS[0], 4, 2, 8), 0, "ttft:1")


def test_every_run_starts_with_an_empty_prefix_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run finds the prompts of another variant on the same server."""
    server = _Server()
    monkeypatch.setattr(serving, "bench_serve", lambda options, budgets: _result(8))
    figures = serving.run(_served(server, (1.0, 0.5)), Load(WORKLOADS[0], 4, 2, 8), 0, "ttft:1")
    assert server.resets == 1
    assert set(figures) == {"fake", "fake: 1.0", "fake: 0.5"}


def test_budgets_are_sent_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if vLLM's load generator stops sending what a request overrides, or the patch is not undone."""
    from vllm.benchmarks import serve

    seen: list[Any] = []

    async def main_async(args: Any) -> dict[str, Any]:
        seen.extend(serve.get_samples(args, None))
        return {}

    original = serve.get_samples
    monkeypatch.setattr(serve, "main_async", main_async)
    monkeypatch.setattr(
        serve, "get_samples", lambda *a, **k: [SimpleNamespace(request_overrides=None) for _ in range(3)]
    )
    load.bench_serve(["--dataset-name", "random"], (1.0, 0.5))
    budgets = [request.request_overrides["vllm_xargs"]["buddy_budget"] for request in seen]
    assert budgets == [1.0, 0.5, 1.0]
    monkeypatch.undo()
    assert serve.get_samples is original
