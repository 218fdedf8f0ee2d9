"""Draws the results of benchmarks.speed.overload: latency, requests and load over the seconds of one run.

    python -m benchmarks.speed.overload_plot benchmarks/results/cpu_overload.jsonl docs/overload.png

It reads nothing but the results file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.plotting import draw_from_file, new_canvas

Row = dict[str, Any]
LIMIT = 1.3  # of the unloaded server's p99


def plot_overload(rows: Sequence[Row], out: Path) -> None:
    """Draw the latency between tokens, the requests in the server and the load over the seconds of one run.

    Raises:
        SystemExit: `rows` have no series, or matplotlib is not installed.
    """
    names = list(dict.fromkeys(row["variant"] for row in rows if row.get("series") == "itl"))
    if not names:
        raise SystemExit("these rows have no series, so there is nothing to draw")
    canvas = new_canvas(11.5, 3.8)
    latency, requests, load = canvas.subplots(1, 3, sharex=True)
    for colour, name in zip(("C1", "C0", "C2", "C3"), names):
        itl, gauges, unloaded = (
            [row for row in rows if row.get("series") == series and row["variant"] == name]
            for series in ("itl", "gauges", "unloaded")
        )
        seconds = [row["second"] for row in itl]
        latency.plot(seconds, [row["p99_itl_ms"] for row in itl], color=colour, label=name)
        # If the client stalls for a second, tokens arrive all at once, with latencies of 0.
        median = [row["p50_itl_ms"] or float("nan") for row in itl]
        latency.plot(seconds, median, color=colour, alpha=0.5, linewidth=1)
        latency.axhline(LIMIT * unloaded[0]["p99_itl_ms"], color=colour, linestyle=":")
        seconds = [row["second"] for row in gauges]
        requests.plot(seconds, [r["num_requests_running"] + r["num_requests_waiting"] for r in gauges], color=colour)
        load.plot(seconds, [row["load"] for row in gauges], color=colour)
    latency.set_title(f"ms between tokens: p99, p50 (thin), {LIMIT} x unloaded p99 (dotted)", fontsize=9)
    latency.set_yscale("log")
    requests.set_title("requests in the server, running and waiting", fontsize=9)
    load.set_title("load that the price follows", fontsize=9)
    load.set_ylim(-0.03, 1.03)
    for axis in (latency, requests, load):
        axis.set_xlabel("seconds")
        axis.grid(True, alpha=0.3)
    requests.set_ylim(bottom=0)
    canvas.legend(loc="outside lower center", ncols=4, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(out, dpi=150)


def main() -> None:
    draw_from_file("benchmarks.speed.overload_plot", __doc__, plot_overload)


if __name__ == "__main__":
    main()
