"""Measures inter-token latency under more requests than the full model can serve, by what sets the price of "auto".

    python -m benchmarks.speed.overload --plot docs/overload.png      # SmolLM2-135M, CPU, about 20 minutes on 2 cores

Four servers stay up: stock vLLM, and three of buddy with `default_budget: auto` and price 0, so that an idle server
runs all layers for every request. Two of them have a `load.price`: when requests wait, or many run, new requests get
fewer layers. The first price is full as soon as few requests run side by side, the second lets more of them run before
it rises. No request asks for a budget.

The rate that the full model sustains (*dense sustains*) is the requests/s that stock vLLM finishes when a burst arrives
at once. For each of --arrivals a server with a service objective is added, `slo.itl_ms`: the p99 inter-token latency
(ITL) that the second price comes to under such arrivals, the median of as many runs as there are rounds, or --itl-ms.
So the two can be compared at the same latency. Each round then sends to the buddy servers requests one at a time
(unloaded), and, in a *step* a Poisson process of 1.5 times that rate, in a *ramp* one that rises to it from 1
request/s, in a *burst* 64 requests at once. (vLLM's ramp ends at a whole number of requests/s and is linear in the
number of requests sent, so that it is steep at the end.) The p99 under load is divided by the median of those of all
servers unloaded in that round, where they do the same, and by the objective where there is one. `vllm bench serve`
sends and times the requests; price, load and the chosen budgets are read from /metrics.

All servers have a small token limit per step, as is usual where latency between tokens matters: a long prompt then
delays others only briefly. The benchmark refuses to show figures if outputs differ from the reference's, a server dies
or a request fails.
"""

import argparse
import json
import math
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness.load import Load, Workload, positive_number
from benchmarks.harness.reference_check import Routing, served_routings
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Rounds, add_rounds_option, positive_int
from benchmarks.harness.servers import Server
from benchmarks.speed.overload_plot import plot_overload
from benchmarks.speed.serving import Served, check, open_server, send
from vllm_buddy.artifact import SHIPPED_DIR, Artifact, load_artifact
from vllm_buddy.models.embedded import DEFAULT_MODEL, fetch

OVERLOAD = 1.5
WORKLOAD = Workload("64 in, 128 out", 0, 64, 128)
WRITES = Workload("1,500 in, 4 out", 0, 1500, 4)  # of the warm-up
CACHE_INFO = "vllm:cache_config_info"
# A full step of so many tokens at the fewest layers costs about as much as a step of one request at all layers.
LIMITS = ("--max-num-batched-tokens", "16", "--max-num-seqs", "16")
# Prices when fully loaded, and the numbers of running requests at which they rise and are full, as in
# benchmarks.speed.slo. Long before the first is full, even the requests that lose most by it run the fewest layers.
BY_HAND: dict[str, dict[str, Any]] = {
    "auto, price follows load": {"load": {"price": 12.0, "running": [1, 4], "waiting": [1, 4]}},
    "auto, price follows load later": {"load": {"price": 6.0, "running": [4, 16], "waiting": [4, 16]}},
}
COMPARED = "auto, price follows load later"  # gives the latency for the objective
GAUGES = ("vllm_buddy:load", "vllm_buddy:auto_price", "vllm:num_requests_running", "vllm:num_requests_waiting")
CHECKED_BUDGETS = (1.0, 0.5)
AUTO, OBJECTIVE = "auto, price 0", "auto, objective"
STEP, RAMP, BURST = ARRIVALS = ("step", "ramp", "burst")
METRICS = (
    "unloaded_p99_itl_ms",
    "p50_itl_ms",
    "p99_itl_ms",
    "p99_ttft_ms",
    "output_tokens_per_s",
    "mean_budget_run",
)
_POLL_S = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.overload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_rounds_option(parser, 3)
    parser.add_argument("--arrivals", nargs="+", choices=ARRIVALS, default=[STEP], help="default: step")
    parser.add_argument("--itl-ms", type=positive_number, help="objective; default: what a load price comes to")
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
    rounds, series = Rounds(args.rounds), []
    with tempfile.TemporaryDirectory(prefix="vllm_buddy-overload-") as work, ExitStack() as stack:
        stock, *autos = open_servers(stack, model, artifact, artifact_dir, Path(work))
        rounds.mark_checked(check([stock, *autos], model, artifact))
        burst = Load(WORKLOAD, float("inf"), args.seconds, args.burst)
        for served in (stock, *autos):
            warm_up(served)
        sustained = []
        for index in range(args.rounds):
            sustained.append(send(stock, burst, seed=index + 1)["request_throughput"])
            rounds.add(index, stock.name, sustained_per_s=sustained[-1])
        rate = OVERLOAD * float(np.median(sustained))
        print(f"dense sustains {np.median(sustained):.2f} requests/s; {rate:.2f} will arrive", flush=True)
        figures = [rounds.row("sustained_per_s", rounds.values("sustained_per_s", stock.name), variant=stock.name)]
        rounds.mark_checked(_variant(served.name, kind) for served in autos for kind in args.arrivals)
        by_hand = next(served for served in autos if served.name == COMPARED)
        for kind in args.arrivals:
            load = arriving(kind, rate, args.seconds, args.burst)
            itl_ms = args.itl_ms or usual_p99_itl_ms(by_hand, load, args.rounds)
            print(f"{kind}: the objective is a p99 of {itl_ms} ms between tokens", flush=True)
            with ExitStack() as of_kind:
                settings = {"slo": {"itl_ms": itl_ms}}
                objective = open_auto(of_kind, OBJECTIVE, settings, model, artifact, artifact_dir, Path(work))
                check([objective], model, artifact)
                rounds.mark_checked([_variant(OBJECTIVE, kind)])
                warm_up(objective)
                variants = [*autos, objective]
                for index in range(args.rounds):
                    for served in variants if index % 2 == 0 else reversed(variants):
                        traced = run(rounds, served, kind, load, index, args.alone)
                        if index + 1 == args.rounds and kind == args.arrivals[0]:
                            series += traced
                    print(f"{kind}: round {index + 1} of {args.rounds} done", flush=True)
            for name in (AUTO, *BY_HAND, OBJECTIVE):
                figures += figures_of(rounds, name, kind, load, itl_ms if name == OBJECTIVE else None)
    return figures + series


def warm_up(served: Served) -> None:
    """Send requests, some of which together take the whole KV cache.

    The first write to a page of memory takes long, and pages of all layers are written in the same steps.
    """
    send(served, Load(WORKLOAD, float("inf"), 1, 16), seed=0)
    families = text_string_to_metric_families(served.server.get("/metrics").decode())
    (info,) = (sample.labels for family in families for sample in family.samples if sample.name == CACHE_INFO)
    num_tokens = int(info["num_gpu_blocks"]) * int(info["block_size"])
    send(served, Load(WRITES, float("inf"), 1, math.ceil(num_tokens / (WRITES.unique + WRITES.output))), seed=1)


def usual_p99_itl_ms(served: Served, load: "Arriving", num_runs: int) -> float:
    """Return the median of some runs under a load, none of which is one of the rounds."""
    runs = [send(served, *load.sent(seed=1000 + index))["p99_itl_ms"] for index in range(num_runs)]
    return round(float(np.median(runs)), 2)


def figures_of(
    rounds: Rounds, name: str, kind: str, load: "Arriving", objective_ms: float | None
) -> list[dict[str, Any]]:
    """Return a row per figure of a server under one kind of arrivals."""
    variant = _variant(name, kind)
    about = {"variant": name, "arrivals": kind, "requests": load.num_requests}
    about |= {"rate": round(load.rate, 2), "workload": WORKLOAD.name}
    about |= {} if objective_ms is None else {"objective_ms": objective_ms}
    p99 = rounds.values("p99_itl_ms", variant)
    rows = [rounds.row(metric, rounds.values(metric, variant), **about) for metric in METRICS]
    # All servers do the same while there is no load, and differ there by chance alone.
    unloaded = [rounds.values("unloaded_p99_itl_ms", _variant(each, kind)) for each in (AUTO, *BY_HAND, OBJECTIVE)]
    rows.append(rounds.row("p99_itl_over_unloaded", p99 / np.median(unloaded, axis=0), **about))
    if objective_ms is not None:
        rows.append(rounds.row("p99_itl_over_objective", p99 / objective_ms, **about))
    return rows


@dataclass(frozen=True)
class Arriving:
    """Requests that arrive in one of ARRIVALS.

    rate: requests/s that arrive at most. options: of `vllm bench serve`, beside those of the load.
    """

    load: Load
    rate: float
    options: tuple[str, ...] = ()

    @property
    def num_requests(self) -> int:
        return self.load.num_requests

    def sent(self, seed: int) -> tuple[Any, ...]:
        """Return the arguments of `send` after the server."""
        return (self.load, seed, *self.options)


def arriving(kind: str, rate: float, seconds: float, burst: int) -> Arriving:
    """Return the load of one of ARRIVALS. rate: requests/s that arrive at most. burst: requests that arrive at once."""
    if kind == STEP:
        return Arriving(Load(WORKLOAD, round(rate, 2), seconds, burst), rate)
    if kind == BURST:
        return Arriving(Load(WORKLOAD, float("inf"), seconds, burst), rate)
    top = max(2, round(rate))  # vLLM takes whole numbers
    ramp = ("--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1", "--ramp-up-end-rps", str(top))
    num_requests = max(8, round((1 + top) / 2 * seconds))
    return Arriving(Load(WORKLOAD, float("inf"), seconds, num_requests), top, ramp)


def _variant(name: str, kind: str) -> str:
    """The name of a server's figures in Rounds."""
    return f"{name}, {kind}"


def open_servers(stack: ExitStack, model: Path, artifact: Artifact, artifact_dir: Path, work: Path) -> list[Served]:
    """Return stock, auto with a constant price, and auto with the prices that follow the load."""
    stock = open_server(stack, "stock", model, work, "--model-impl", "auto", *LIMITS)
    dense = Routing(name="dense", layers=artifact.config.base_model.num_layers, path=artifact.router().full)
    autos: dict[str, dict[str, Any]] = {AUTO: {}, **BY_HAND}
    return [
        Served("stock", stock, (), [dense]),
        *(open_auto(stack, name, settings, model, artifact, artifact_dir, work) for name, settings in autos.items()),
    ]


def open_auto(
    stack: ExitStack,
    name: str,
    settings: dict[str, Any],
    model: Path,
    artifact: Artifact,
    artifact_dir: Path,
    work: Path,
) -> Served:
    """Return a server that chooses budgets at price 0, with further settings."""
    buddy = {"artifact": str(artifact_dir), "default_budget": "auto", "auto": {"price": 0.0}, **settings}
    config = json.dumps({"buddy": buddy})
    log_name = name.replace(",", "").replace(" ", "-")
    server = open_server(stack, log_name, model, work, "--additional-config", config, *LIMITS)
    # The check sends budgets as numbers: a budget that the server chooses would follow the load of the check.
    return Served(name, server, (), served_routings(artifact, CHECKED_BUDGETS, name))


def run(rounds: Rounds, served: Served, kind: str, load: Arriving, index: int, alone: int) -> list[dict[str, Any]]:
    """Run a server unloaded, then overloaded. Adds the figures to `rounds` and returns the rows second by second."""
    unloaded = send(served, Load(WORKLOAD, float("inf"), 1, alone), index + 1, "--max-concurrency", "1")
    before = auto_budgets(served.server)
    with Poll(served.server) as poll:
        loaded = send(served, *load.sent(index + 1))
    after = auto_budgets(served.server)
    rounds.add(
        index,
        _variant(served.name, kind),
        unloaded_p99_itl_ms=unloaded["p99_itl_ms"],
        p50_itl_ms=loaded["p50_itl_ms"],
        p99_itl_ms=loaded["p99_itl_ms"],
        p99_ttft_ms=loaded["p99_ttft_ms"],
        output_tokens_per_s=loaded["output_throughput"],
        mean_budget_run=(after[0] - before[0]) / (after[1] - before[1]),
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
    """Return the sum and the number of the budgets of ended requests. The metrics of an idle server are complete."""
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
