"""Generates the tables on budget "auto": what choosing a budget saves, and the effect of a price that follows load."""

from tools.tables.results import Row, by_key, load_rows, number, rounds_note, section, spread, table

MIXED = "mixed"
_LATENCIES = ("unloaded_p99_itl_ms", "p50_itl_ms", "p99_itl_ms")


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
    rows = [row for row in load_rows("cpu_overload.jsonl") if "metric" in row]
    found = {(row["variant"], row["metric"]): row for row in rows}
    names = list(dict.fromkeys(row["variant"] for row in rows if row["metric"] == "p99_itl_ms"))
    sustained = next(row for row in rows if row["metric"] == "sustained_per_s")
    loaded = found[names[0], "p99_itl_ms"]
    note = (
        f"`python -m benchmarks.speed.overload`: stock vLLM sustains {spread(sustained)} requests/s of "
        f"{loaded['workload']} tokens; {number(loaded['rate'])} arrive. {rounds_note([loaded])} Latencies in ms."
    )
    heads = [
        "server",
        "ITL p99 unloaded",
        "ITL p50",
        "ITL p99",
        "p99 over unloaded",
        "TTFT p99",
        "tokens/s",
        "mean budget",
    ]
    lines = [
        [
            name,
            *(spread(found[name, metric]) for metric in _LATENCIES),
            spread(found[name, "p99_itl_over_unloaded"]),
            *(spread(found[name, metric]) for metric in ("p99_ttft_ms", "output_tokens_per_s", "mean_budget")),
        ]
        for name in names
    ]
    return section(note, heads, lines)


def overload_figures() -> dict[str, float]:
    """Return p99 latency over that of an unloaded server, by whether the price follows the load, and what it costs."""
    rows = by_key([row for row in load_rows("cpu_overload.jsonl") if "metric" in row], "variant", "metric")
    names = ("price 0", "price follows load")
    found = {name: float(rows[f"auto, {name}", "p99_itl_over_unloaded"]["p50"]) for name in names}
    return {**found, "mean budget": float(rows[f"auto, {names[1]}", "mean_budget"]["p50"])}


def prices_table() -> str:
    """Return the mean budget at each price, from the shipped artifact's configuration."""
    from vllm_buddy.artifact import SHIPPED_DIR, load_artifact
    from vllm_buddy.models.embedded import DEFAULT_MODEL

    predictor = load_artifact(SHIPPED_DIR / DEFAULT_MODEL).config.predictor
    assert predictor is not None
    lines = [[f"{point.price:g}", f"{point.budget:.2f}"] for point in predictor.prices]
    return "\n".join(table(["price", "mean budget"], lines))
