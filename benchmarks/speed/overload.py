"""Measures inter-token latency under more requests than the full model can serve, with and without a load price.

    python -m benchmarks.speed.overload --plot docs/overload.png      # SmolLM2-135M, CPU, about 12 minutes on 2 cores

Three servers stay up: stock vLLM, and two of buddy with `default_budget: auto` and price 0, so that an idle server runs
all layers for every request. One of the two has a `load.price`: when requests wait, or many run, new requests get fewer
layers. No request asks for a budget.

The rate that the full model sustains (*dense sustains*) is the requests/s that stock vLLM finishes when a burst arrives
at once. Each round then sends to both buddy servers: requests one at a time (unloaded), and a Poisson process of 1.5
times that rate. The p99 inter-token latency (ITL) under load is divided by that of the same server unloaded. `vllm
bench serve` sends and times the requests; price, load and the chosen budgets are read from /metrics.

All servers have a small token limit per step, as is usual where latency between tokens matters: a long prompt then
delays others only briefly. The benchmark refuses to show figures if outputs differ from the reference's, a server dies
or a request fails.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness.load import Load, Workload, positive_number
from benchmarks.harness.reference_check import Routing
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Rounds, add_rounds_option, positive_int
from benchmarks.harness.servers import Server
from benchmarks.speed.overload_plot import plot_overload
from benchmarks.speed.serving import Served, check, open_server, send
from vllm_buddy.artifact import SHIPPED_DIR, Artifact, load_artifact
from vllm_buddy.method import depth_for_budget
from vllm_buddy.models.embedded import DEFAULT_MODEL, fetch

OVERLOAD = 1.5
WORKLOAD = Workload("64 in, 128 out", 0, 64, 128)
# A full step of so many tokens at the fewest layers costs about as much as a step of one request at all layers.
LIMITS = ("--max-num-batched-tokens", "16", "--max-num-seqs", "16")
# Numbers of running requests at which the price starts to rise and at which it is full. Long before it is full, even
# the requests that lose most by it run the fewest layers.
LOAD_SETTINGS: dict[str, Any] = {"load": {"price": 12.0, "running": [1, 4], "waiting": [1, 4]}}
GAUGES = ("vllm_buddy:load", "vllm_buddy:auto_price", "vllm:num_requests_running", "vllm:num_requests_waiting")
CHECKED_BUDGETS = (1.0, 0.5)
METRICS = (
    "unloaded_p99_itl_ms",
    "p50_itl_ms",
    "p99_itl_ms",
    "p99_ttft_ms",
    "output_tokens_per_s",
    "mean_budget",
)
_POLL_S = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.overload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_rounds_option(parser, 3)
    parser.add_argument("--seconds", type=positive_number, default=30, help="of arrivals in a run")
    parser.add_argument("--burst", type=positive_int, default=64, help="requests that tell what dense sustains")
    parser.add_argument("--alone", type=positive_int, default=16, help="requests of an unloaded run")
    parser.add_argument("--model", type=Path, help="folder of a model; default: the embedded one")
    parser.add_argument("--artifact", type=Path, default=SHIPPED_DIR / DEFAULT_MODEL, help="default: the shipped one")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_overload.jsonl")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="picture of the last round")
    args = parser.parse_args()
    env = environment()
    rows = measure(args.model or fetch(report=print), args.artifact, args)
    report(args.out, rows, env)
    if args.plot is not None:
        plot_overload(rows, args.plot)
        print(f"written to {args.plot}", flush=True)


def measure(model: Path, artifact_dir: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Start and check the servers and run all rounds.

    Returns a row per figure, and rows with a `series` for the last round.
    """
    artifact = load_artifact(artifact_dir)
    rounds, rows = Rounds(args.rounds), []
    with (
        tempfile.TemporaryDirectory(prefix="vllm_buddy-overload-") as work,
        open_servers(model, artifact, artifact_dir, Path(work)) as (stock, *autos),
    ):
        rounds.mark_checked(check([stock, *autos], model, artifact))
        burst = Load(WORKLOAD, float("inf"), args.seconds, args.burst)
        for served in (stock, *autos):  # warms up
            send(served, Load(WORKLOAD, float("inf"), 1, 16), seed=0)
        sustained = []
        for index in range(args.rounds):
            sustained.append(send(stock, burst, seed=index + 1)["request_throughput"])
            rounds.add(index, stock.name, sustained_per_s=sustained[-1])
        rate = OVERLOAD * float(np.median(sustained))
        print(f"dense sustains {np.median(sustained):.2f} requests/s; {rate:.2f} will arrive", flush=True)
        load = Load(WORKLOAD, round(rate, 2), args.seconds, args.burst)
        for index in range(args.rounds):
            for served in autos if index % 2 == 0 else reversed(autos):
                traced = run(rounds, served, load, index, args.alone)
                if index + 1 == args.rounds:
                    rows += traced
            print(f"round {index + 1} of {args.rounds} done", flush=True)
    figures = [rounds.row("sustained_per_s", rounds.values("sustained_per_s", stock.name), variant=stock.name)]
    about = {"rate": load.rate, "requests": load.num_requests, "workload": WORKLOAD.name}
    for served in autos:
        name = served.name
        ratio = rounds.values("p99_itl_ms", name) / rounds.values("unloaded_p99_itl_ms", name)
        figures += [rounds.row(metric, rounds.values(metric, name), variant=name, **about) for metric in METRICS]
        figures.append(rounds.row("p99_itl_over_unloaded", ratio, variant=name, **about))
    return figures + rows


@contextmanager
def open_servers(model: Path, artifact: Artifact, artifact_dir: Path, work: Path) -> Iterator[list[Served]]:
    """Yield stock, auto with a constant price, and auto with a price that follows the load."""
    num_layers = artifact.config.base_model.num_layers
    router, schedule = artifact.router(), artifact.schedule()
    with ExitStack() as stack:
        stock = open_server(stack, "stock", model, work, "--model-impl", "auto", *LIMITS)
        dense = Routing(name="dense", layers=num_layers, path=router.full)
        served = [Served("stock", stock, (), [dense])]
        for name, settings in (("auto, price 0", {}), ("auto, price follows load", LOAD_SETTINGS)):
            buddy = {"artifact": str(artifact_dir), "default_budget": "auto", "auto": {"price": 0.0}, **settings}
            config = json.dumps({"buddy": buddy})
            log_name = name.replace(",", "").replace(" ", "-")
            server = open_server(stack, log_name, model, work, "--additional-config", config, *LIMITS)
            # The check sends budgets as numbers: a budget that the server chooses would follow the load of the check.
            depths = {b: depth_for_budget(b, num_layers) for b in CHECKED_BUDGETS}
            routings = [
                Routing(name=f"{name}: {b}", layers=depth, budget=b, router=router, schedule=schedule)
                for b, depth in depths.items()
            ]
            served.append(Served(name, server, (), routings))
        yield served


def run(rounds: Rounds, served: Served, load: Load, index: int, alone: int) -> list[dict[str, Any]]:
    """Run a server unloaded, then overloaded. Adds the figures to `rounds` and returns the rows second by second."""
    unloaded = send(served, Load(load.workload, float("inf"), 1, alone), index + 1, "--max-concurrency", "1")
    before = auto_budgets(served.server)
    with Poll(served.server) as poll:
        loaded = send(served, load, index + 1)
    after = auto_budgets(served.server)
    rounds.add(
        index,
        served.name,
        unloaded_p99_itl_ms=unloaded["p99_itl_ms"],
        p50_itl_ms=loaded["p50_itl_ms"],
        p99_itl_ms=loaded["p99_itl_ms"],
        p99_ttft_ms=loaded["p99_ttft_ms"],
        output_tokens_per_s=loaded["output_throughput"],
        mean_budget=(after[0] - before[0]) / (after[1] - before[1]),
    )
    return [
        *itl_by_second(served.name, loaded),
        *({"series": "gauges", "variant": served.name, **row} for row in poll.rows),
        {"series": "unloaded", "variant": served.name, "p99_itl_ms": round(unloaded["p99_itl_ms"], 2)},
    ]


def itl_by_second(name: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return p50 and p99 of the inter-token latencies that ended in each second of a run."""
    start = min(result["start_times"])
    ends: dict[int, list[float]] = {}
    for sent, first, gaps in zip(result["start_times"], result["ttfts"], result["itls"], strict=True):
        for end, gap in zip(sent + first + np.cumsum(gaps) - start, gaps, strict=True):
            ends.setdefault(int(end), []).append(gap * 1e3)
    return [
        {"series": "itl", "variant": name, "second": second}
        | {f"p{p}_itl_ms": round(float(np.percentile(gaps, p)), 2) for p in (50, 99)}
        for second, gaps in sorted(ends.items())
    ]


def metrics(server: Server) -> dict[str, float]:
    """Return /metrics as values by name. Values of several engines are summed; here there is one engine."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(server.get("/metrics").decode()):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def auto_budgets(server: Server) -> tuple[float, float]:
    """Return the sum and the number of the budgets chosen so far. The metrics of an idle server are complete."""
    found = metrics(server)
    return found["vllm_buddy:auto_budget_sum"], found["vllm_buddy:auto_budget_count"]


class Poll(threading.Thread):
    """Reads GAUGES while the block runs. rows: a dictionary for each reading, with its second."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.rows: list[dict[str, Any]] = []
        self._server = server
        self._done = threading.Event()

    def __enter__(self) -> "Poll":
        self._began = time.monotonic()
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        while not self._done.wait(_POLL_S):
            # Polls are few and cheap: this process also times tokens, and the server answers both on one core.
            lines = self._server.get("/metrics").decode().splitlines()
            seconds = round(time.monotonic() - self._began, 1)
            found = {name: float(next(x for x in lines if x.startswith(name + "{")).split()[-1]) for name in GAUGES}
            self.rows.append({"second": seconds, **{name.split(":")[1]: value for name, value in found.items()}})


if __name__ == "__main__":
    main()
