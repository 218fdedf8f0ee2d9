"""Compares service objectives with hand-set load prices on a model of a server, in simulated time.

    python -m benchmarks.speed.slo --plot docs/slo.png      # about a minute on one core

`benchmarks.harness.simulated_server` is the server; the choice of budgets, its price and its objectives are those of
the real one. First all layers run for all requests, which tells the rate that the full model sustains (*dense*). Then
requests arrive at up to 1.5 times that rate: in a *step*, a *ramp* and *bursts*, for 60 s, and at a tenth of it for
another 20 s.

A load price of certain settings leads to some 99th percentile of inter-token latency (ITL) and to some mean budget.
For each of two such settings the same percentile is then given as an objective, and the mean budgets are compared.
The figures are those of the 60 s, over several seeds. Nothing here depends on the machine.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.plotting import new_canvas
from benchmarks.harness.result_rows import RESULTS_DIR, environment, percentiles, report
from benchmarks.harness.rounds import positive_int
from benchmarks.harness.simulated_server import (
    VOCAB_SIZE,
    SimulatedServer,
    StepTime,
    Trace,
    arrivals,
    drawn_predictor,
)
from vllm_buddy.serving.admission.auto_limits import AutoLimits
from vllm_buddy.serving.admission.chooser import BudgetChooser
from vllm_buddy.serving.admission.load import LoadPrice
from vllm_buddy.serving.admission.slo import Objectives
from vllm_buddy.serving.start.setting_sections import ITL, TTFT

NUM_LAYERS = 30
DEPTHS = (15, 17, 19, 21, 23, 25, 27, 30)
OVERLOAD = 1.5
LOADED_S, CALM_S = 60.0, 20.0
KINDS = ("step", "ramp", "burst")
TTFT_S = 1.0
# Price when fully loaded, and the numbers of running requests at which it rises and is full. The first is that of
# benchmarks.speed.overload, the second lets more run side by side before it rises.
HAND_SET = {"price 12 at 4 running": (12.0, (1, 4)), "price 6 at 16 running": (6.0, (4, 16))}
METRICS = ("p99_itl_ms", "p99_over_objective", "p99_ttft_ms", "mean_budget")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.slo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=positive_int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / "simulated_slo.jsonl")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="picture of the first seed")
    args = parser.parse_args()
    env = environment("cpu")
    rows, traces = measure(args.seeds)
    report(args.out, rows, env)
    if args.plot is not None:
        plot(traces, args.plot)
        print(f"written to {args.plot}", flush=True)


def server(
    load: LoadPrice | None = None, objectives_s: dict[str, float] | None = None, seed: int = 0
) -> SimulatedServer:
    """Return a server with price 0 without load, and a load price, objectives or neither."""
    limits = AutoLimits(NUM_LAYERS, DEPTHS, 0.5, 1.0, 0.0, None, 0.5, objectives_s or {})
    keeps = Objectives(objectives_s) if objectives_s else None
    chooser = BudgetChooser(drawn_predictor(DEPTHS, NUM_LAYERS), limits, load, keeps)
    return SimulatedServer(chooser, limits, StepTime(), seed)


def hand_set(name: str) -> LoadPrice:
    """Return a load price of HAND_SET."""
    price, running = HAND_SET[name]
    return LoadPrice(price, running, running)


def sustained() -> float:
    """Return the requests/s that the server finishes at all layers when all arrive at once."""
    trace = server().serve([0.0] * 200, [0] * 200)
    return len(trace.budgets) / trace.budgets[-1][0]


def run(kind: str, rate: float, serving: SimulatedServer, seed: int) -> Trace:
    """Serve arrivals of one kind, and the calm after them."""
    calm = LOADED_S + arrivals("step", 0.1 * rate, CALM_S, seed + 1000)
    times = np.concatenate([arrivals(kind, rate, LOADED_S, seed), calm])
    return serving.serve(times.tolist(), np.random.default_rng(seed).integers(0, VOCAB_SIZE, len(times)).tolist())


def figures(trace: Trace, objective_s: float | None = None) -> dict[str, float]:
    """Return METRICS of the loaded time. objective_s: of ITL."""

    def loaded(series: Sequence[tuple[float, float]]) -> list[float]:
        return [value for at, value in series if at < LOADED_S]

    p99_itl = float(np.percentile(loaded(trace.itl), 99))
    found = {
        "p99_itl_ms": 1e3 * p99_itl,
        "p99_ttft_ms": 1e3 * float(np.percentile(loaded(trace.ttft), 99)),
        "mean_budget": float(np.mean(loaded(trace.budgets))),
    }
    return found if objective_s is None else {**found, "p99_over_objective": p99_itl / objective_s}


def measure(num_seeds: int) -> tuple[list[dict[str, Any]], dict[str, dict[str, Trace]]]:
    """Run all, and return a row per figure, and the traces of the first seed by kind of arrivals and variant."""
    rate = OVERLOAD * sustained()
    found: dict[tuple[str, str, str], list[float]] = {}
    traces: dict[str, dict[str, Trace]] = {kind: {} for kind in KINDS}

    def add(kind: str, name: str, seed: int, serving: SimulatedServer, itl_s: float | None = None) -> dict[str, float]:
        trace = run(kind, rate, serving, seed)
        if seed == 0:
            traces[kind][name] = trace
        result = figures(trace, itl_s)
        for metric, value in result.items():
            found.setdefault((kind, name, metric), []).append(value)
        return result

    for kind in KINDS:
        for seed in range(num_seeds):
            add(kind, "price 0", seed, server(seed=seed))
            for name in HAND_SET:
                by_hand = add(kind, name, seed, server(hand_set(name), seed=seed))
                itl_s = by_hand["p99_itl_ms"] / 1e3
                add(kind, f"objective: ITL of {name}", seed, server(None, {ITL: itl_s}, seed), itl_s)
            both = {ITL: itl_s, TTFT: TTFT_S}
            add(kind, f"objective: ITL of {name}, TTFT {TTFT_S:g} s", seed, server(None, both, seed), itl_s)
    rows: list[dict[str, Any]] = [{"metric": "sustained_per_s", **percentiles([rate / OVERLOAD]), "n": 1}]
    for (kind, name, metric), values in found.items():
        rows.append(
            {"metric": metric, "arrivals": kind, "variant": name, **percentiles(values), "n": len(values)}
            | {"rate": round(rate, 2)}
        )
    return rows, traces


def plot(traces: dict[str, dict[str, Trace]], out: Path) -> None:
    """Draw p99 of inter-token latency and mean layers over the seconds, for each kind of arrivals.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    canvas = new_canvas(11.5, 6)
    grid = canvas.subplots(2, len(traces), sharex=True, sharey="row")
    for column, (kind, by_name) in enumerate(traces.items()):
        latency, depth = grid[0][column], grid[1][column]
        shown = [name for name in by_name if not name.endswith("4 running")]
        for name, colour in zip(shown, ("C1", "C2", "C0", "C3")):
            trace = by_name[name]
            seconds, p99 = by_second(trace.itl, lambda values: float(np.percentile(values, 99)))
            latency.plot(seconds, 1e3 * p99, color=colour, linewidth=1, label=name if column == 0 else None)
            seconds, mean = by_second(trace.budgets, lambda values: float(np.mean(values)))
            depth.plot(seconds, mean, color=colour, linewidth=1)
        by_hand = next(trace for name, trace in by_name.items() if name.startswith("price 6"))
        objective = figures(by_hand)["p99_itl_ms"]
        latency.axhline(objective, color="black", linestyle=":", linewidth=1)
        latency.set_title(f"{kind}: p99 ms between tokens of each second", fontsize=9)
        depth.set_title("mean budget of requests that end", fontsize=9)
        depth.set_xlabel("seconds")
        for axis in (latency, depth):
            axis.grid(True, alpha=0.3)
    canvas.legend(loc="outside lower center", ncols=2, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(out, dpi=150)


def by_second(series: Sequence[tuple[float, float]], summary: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the seconds that have values, and the summary of the values of each."""
    values: dict[int, list[float]] = {}
    for at, value in series:
        values.setdefault(int(at), []).append(value)
    seconds = sorted(values)
    return np.asarray(seconds), np.asarray([summary(values[second]) for second in seconds])


if __name__ == "__main__":
    main()
