"""Tests the arithmetic of the overload benchmark, and its picture."""

import argparse
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
from benchmarks.speed import overload
from benchmarks.speed.overload import auto_budgets, itl_by_second, metrics
from benchmarks.speed.overload_plot import plot_overload


class _Server:
    """Stands in for a server that answers /metrics."""

    def __init__(self, text: str) -> None:
        self.text = text

    def get(self, path: str) -> bytes:
        assert path == "/metrics"
        return self.text.encode()


METRICS = """# TYPE vllm_buddy:auto_budget histogram
vllm_buddy:auto_budget_bucket{engine="0",le="0.5"} 3.0
vllm_buddy:auto_budget_bucket{engine="0",le="+Inf"} 4.0
vllm_buddy:auto_budget_count{engine="0"} 4.0
vllm_buddy:auto_budget_sum{engine="0"} 2.5
# TYPE vllm_buddy:load gauge
vllm_buddy:load{engine="0"} 0.25
"""


def test_budgets_and_load_are_read_from_the_metrics() -> None:
    """Fails if the mean budget is taken over buckets, or over requests of other runs."""
    server: Any = _Server(METRICS)
    assert auto_budgets(server) == (2.5, 4.0)
    assert metrics(server)["vllm_buddy:load"] == 0.25


def test_a_warm_up_takes_the_whole_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a server is timed while it writes to some pages of its KV cache for the first time."""
    tokens = []
    monkeypatch.setattr(
        overload,
        "send",
        lambda _, load, seed: tokens.append(load.burst * (load.workload.unique + load.workload.output)),
    )
    served: Any = argparse.Namespace(
        server=_Server(METRICS + 'vllm:cache_config_info{block_size="16",num_gpu_blocks="2850"} 1.0\n')
    )
    overload.warm_up(served)
    assert 16 * 2850 <= tokens[-1] < 16 * 2850 + 2048


def test_a_latency_counts_in_the_second_in_which_its_token_came() -> None:
    """Fails if a latency is drawn at the start of its request: a late slow-down would appear at the beginning."""
    result = {
        "start_times": [100.0, 101.0],
        "ttfts": [0.5, 1.0],
        "itls": [[0.1, 0.1], [0.25, 0.5, 2.0]],
    }
    rows = itl_by_second("auto", result)
    assert [(row["second"], row["p50_itl_ms"]) for row in rows] == [(0, 100.0), (2, 375.0), (4, 2000.0)]
    assert {row["variant"] for row in rows} == {"auto"}


def test_a_picture_of_the_rows(tmp_path: Path) -> None:
    """Fails if the picture needs more than the results file, or rows without series end in an empty picture."""
    rows: list[dict[str, Any]] = []
    gauges = {"num_requests_running": 3.0, "num_requests_waiting": 1.0, "load": 0.5, "auto_price": 4.0}
    for name in ("auto, price 0", "auto, price follows load"):
        rows += [
            {"series": "itl", "variant": name, "second": s, "p50_itl_ms": 30.0, "p99_itl_ms": 40.0} for s in (0, 1)
        ]
        rows += [{"series": "gauges", "variant": name, "second": s, **gauges} for s in (0.5, 1.0)]
        rows.append({"series": "unloaded", "variant": name, "p99_itl_ms": 33.0})
    plot_overload(rows, tmp_path / "overload.png")
    assert (tmp_path / "overload.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="nothing to draw"):
        plot_overload([], tmp_path / "none.png")


class _Stand:
    """Stands in for a server of the benchmark and what it answers to `vllm bench serve`."""

    def __init__(self, name: str) -> None:
        self.name, self.server = name, _Server(METRICS)


def test_all_kinds_of_arrivals_are_sent_and_the_objective_is_what_the_load_price_came_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a kind of arrivals is not sent as itself, or the objective is not the latency to compare at."""
    sent: list[tuple[str, Any, tuple[str, ...]]] = []
    opened: list[dict[str, Any]] = []
    budgets = iter((float(i), float(i)) for i in range(1000))

    def send(served: Any, load: Any, seed: int, *options: str) -> dict[str, Any]:
        sent.append((served.name, load, options))
        return {
            "request_throughput": 4.0,
            "p50_itl_ms": 10.0,
            "p99_itl_ms": {1000: 16.0, 1001: 18.0}.get(seed, 17.5) if served.name == overload.COMPARED else 20.0,
            "p99_ttft_ms": 100.0,
            "output_throughput": 400.0,
            "start_times": [0.0],
            "ttfts": [0.1],
            "itls": [[0.01]],
        }

    def open_auto(stack: Any, name: str, settings: dict[str, Any], *others: Any) -> _Stand:
        opened.append(settings)
        return _Stand(name)

    monkeypatch.setattr(overload, "send", send)
    monkeypatch.setattr(overload, "open_auto", open_auto)
    monkeypatch.setattr(overload, "warm_up", lambda served: send(served, None, 0))
    monkeypatch.setattr(
        overload, "open_servers", lambda *_: [_Stand(name) for name in ("stock", overload.AUTO, *overload.BY_HAND)]
    )
    monkeypatch.setattr(overload, "check", lambda servers, *_: [served.name for served in servers])
    monkeypatch.setattr(overload, "load_artifact", lambda folder: None)
    monkeypatch.setattr(overload, "auto_budgets", lambda server: next(budgets))
    args = argparse.Namespace(rounds=2, seconds=10.0, burst=64, alone=2, arrivals=overload.ARRIVALS, itl_ms=None)
    rows = overload.measure(tmp_path, tmp_path, args)
    assert opened == [{"slo": {"itl_ms": 17.0}}] * 3
    figures = {(row["variant"], row["arrivals"], row["metric"]): row for row in rows if "arrivals" in row}
    assert len(figures) == 3 * (4 * (len(overload.METRICS) + 1) + 1)
    assert figures[overload.OBJECTIVE, "ramp", "p99_itl_ms"]["objective_ms"] == 17.0
    assert figures[overload.OBJECTIVE, "ramp", "p99_itl_over_objective"]["p50"] == round(20 / 17, 4)
    assert figures[overload.COMPARED, "step", "mean_budget_run"]["p50"] == 1.0
    own = [(load, options) for name, load, options in sent if name == overload.OBJECTIVE]
    loaded = [(load, options) for load, options in own if "--max-concurrency" not in options]
    step, ramp, burst = (loaded[first] for first in (1, 4, 7))  # a warm-up and two rounds of each kind
    assert (step[0].rate, step[0].num_requests, step[1]) == (6.0, 60, ())
    assert (ramp[0].rate, ramp[0].num_requests) == (float("inf"), 35)
    assert ramp[1][-1] == "6"
    assert (burst[0].rate, burst[0].num_requests, burst[1]) == (float("inf"), 64, ())
