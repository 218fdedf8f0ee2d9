"""Generates the tables on budget "auto": what choosing a budget saves, and the effect of a price that follows load."""

from typing import NamedTuple

from tools.tables.results import Row, by_key, load_rows, number, rounds_note, section, spread, table

MIXED = "mixed"
OVERLOAD_FILES = ("cpu_overload_objective.jsonl", "cpu_overload.jsonl")
_LATENCIES = ("unloaded_p99_itl_ms", "p50_itl_ms", "p99_itl_ms")
_OTHERS = ("p99_itl_over_unloaded", "p99_itl_over_objective", "p99_ttft_ms", "output_tokens_per_s")
# The mean budget of auto, by what a file has. Before there was the first, requests that were lowered counted as chosen.
_BUDGETS = {
    "mean_budget_run": ("run", "The mean budget is that of the layers that requests ran, those lowered included."),
    "mean_budget": (
        "chosen",
        "The mean budget is that of the choices when requests were decided; running requests are lowered afterwards, "
        "which does not change it.",
    ),
}


def auto_table() -> str:
    """Return budget auto against constant budgets, for all data at the layers of each and for each kind of data."""
    rows = load_rows("quality_auto.json")
    auto = [row for row in rows if row["series"] == "auto"]
    depths = sorted(row["layers"] for row in rows if row["series"] == "constant" and row["data_set"] == MIXED)[1:-1]
    whole = [row for row in auto if row["data_set"] == MIXED]
    chosen = [min(whole, key=lambda row, depth=depth: abs(row["layers"] - depth)) for depth in depths]  # type: ignore[misc]
    chosen += [row for row in auto if row["own_price"] and row not in chosen]
    note = (
        f"{whole[0]['samples']} requests, as many of each kind, from the last fifth of each file. The predictor was "
        "trained on the rest. *Saved*: against the best constant budget of the same mean layers, and standard error; "
        "*share*: of what the best choice in hindsight saves. The last lines are at the artifact's price."
    )
    heads = ["data", "price", "mean layers", "auto, nats", "constant", "best", "saved", "share"]
    return section(note, heads, map(_auto_line, chosen))


def _auto_line(row: Row) -> list[str]:
    share = row["share_of_best"]
    return [
        row["data_set"],
        f"{row['price']:g}",
        f"{row['layers']:.2f}",
        *(f"{row[key]:.3f}" for key in ("loss", "constant", "best")),
        f"{row['gain']:.3f} ± {row['stderr']:.3f}",
        "" if share is None else f"{share:.0%}",
    ]


def overload_table() -> str:
    """Return the latency between tokens at 1.5 times the load that the full model sustains."""
    return _overload_section("cpu_overload.jsonl")


def overload_objective_table() -> str:
    """Return the same of a run with a service objective beside two load prices."""
    return _overload_section("cpu_overload_objective.jsonl")


def _overload_section(name: str) -> str:
    rows = _overload_rows(name)
    found = by_key(rows, "arrivals", "variant", "metric")
    names = list(dict.fromkeys((row["arrivals"], row["variant"]) for row in rows if row["metric"] == "p99_itl_ms"))
    sustained = next(row for row in rows if row["metric"] == "sustained_per_s")
    loaded = found[(*names[0], "p99_itl_ms")]
    budget = _budget_metric(rows)
    kind, meaning = _BUDGETS[budget]
    note = (
        f"`python -m benchmarks.speed.overload`: stock vLLM sustains {spread(sustained)} requests/s of "
        f"{loaded['workload']} tokens; {number(loaded['rate'])} arrive. {rounds_note([loaded])} Latencies in ms. "
        f"{meaning}"
    )
    heads = [
        "arrivals",
        "server",
        "ITL p99 unloaded",
        "ITL p50",
        "ITL p99",
        "p99 over unloaded",
        "p99 over objective",
        "TTFT p99",
        "tokens/s",
        f"mean budget {kind}",
    ]
    lines = [
        [
            arrivals,
            _with_objective(name, found[arrivals, name, "p99_itl_ms"]),
            *(spread(found.get((arrivals, name, metric))) for metric in (*_LATENCIES, *_OTHERS, budget)),
        ]
        for arrivals, name in names
    ]
    return section(note, heads, lines)


def _budget_metric(rows: list[Row]) -> str:
    """The metric of _BUDGETS that a file has."""
    there = {row["metric"] for row in rows}
    return next(name for name in _BUDGETS if name in there)


def _with_objective(name: str, row: Row) -> str:
    return f"{name} {number(row['objective_ms'])}" if "objective_ms" in row else name


def _overload_rows(name: str) -> list[Row]:
    # Files that were written before there were several kinds of arrivals do not name it.
    return [{"arrivals": "step", **row} for row in load_rows(name) if "metric" in row]


class Overloaded(NamedTuple):
    """A server under the step of load. itl_ms, ttft_ms: 99th percentiles. budget: mean share of layers run."""

    itl_ms: float
    ttft_ms: float
    budget: float


def overload_figures() -> tuple[Overloaded, Overloaded]:
    """Return the newest run of the step of load: without a price, and with one that follows the load."""
    steps = max(
        ([row for row in _overload_rows(name) if row["arrivals"] == "step"] for name in OVERLOAD_FILES),
        key=lambda rows: str(rows[0]["date"]),
    )
    rows = by_key(steps, "variant", "metric")
    metrics = ("p99_itl_ms", "p99_ttft_ms", _budget_metric(steps))
    full, follows = (
        Overloaded(*(float(rows[f"auto, {name}", metric]["p50"]) for metric in metrics))
        for name in ("price 0", "price follows load")
    )
    return full, follows


def objectives_table() -> str:
    """Return service objectives and hand-set load prices under three kinds of arrivals, in simulated time."""
    rows = load_rows("simulated_slo.jsonl")
    sustained, *rows = rows
    found = by_key(rows, "arrivals", "variant", "metric")
    note = (
        f"`python -m benchmarks.speed.slo`: the full model sustains {number(sustained['p50'])} requests/s of the "
        f"simulated server, up to {number(rows[0]['rate'])} arrive. Medians of {rows[0]['n']} seeds with 20th to 80th "
        "percentile. Latencies in ms. The mean budget is that of the layers that tokens ran."
    )
    metrics = ("p99_itl_ms", "p99_over_objective", "p99_ttft_ms", "mean_budget")
    lines = [
        [arrivals, variant, *(spread(found.get((arrivals, variant, metric))) for metric in metrics)]
        for arrivals, variant in dict.fromkeys((row["arrivals"], row["variant"]) for row in rows)
    ]
    return section(note, ["arrivals", "price", "ITL p99", "p99 over objective", "TTFT p99", "mean budget run"], lines)


def prices_table() -> str:
    """Return the mean budget at each price, from the shipped artifact's configuration."""
    from vllm_buddy.artifact import SHIPPED_DIR, load_artifact
    from vllm_buddy.models.embedded import DEFAULT_MODEL

    predictor = load_artifact(SHIPPED_DIR / DEFAULT_MODEL).config.predictor
    assert predictor is not None
    lines = [[f"{point.price:g}", f"{point.budget:.2f}"] for point in predictor.prices]
    return "\n".join(table(["price", "mean budget"], lines))
