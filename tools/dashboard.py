"""Writes the Grafana dashboard, deploy/grafana/dashboards/vllm_buddy.json.

    python -m tools.dashboard            # rewrite
    python -m tools.dashboard --check    # exit 1 if the file is not up to date

`tests/serving/telemetry/test_deploy.py` checks the file, and that each metric exists.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "dashboards" / "vllm_buddy.json"
_WIDTH, _HEIGHT, _PANELS_PER_ROW = 24, 8, 3
_SERIES = 'model_name=~"$model",engine=~"$engine"'
_SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True)
class Panel:
    """A graph. lines: legend -> expression in PromQL. unit: Grafana's name of it; most: end of the axis."""

    title: str
    lines: dict[str, str]
    description: str = ""
    unit: str = "none"
    most: float | None = None


def rate(metric: str, by: str = "") -> str:
    """Growth of a counter per second, summed over series. by: labels that are kept, with commas."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{{{_SERIES}}}[$__rate_interval]))"


def share(part: str, whole: str, by: str = "") -> str:
    """What share of one counter's growth another one's is."""
    return f"{rate(part, by)} / {rate(whole, by)}"


def mean(histogram: str) -> str:
    """Mean of what a histogram observed."""
    return share(f"{histogram}_sum", f"{histogram}_count")


def quantile(q: float, histogram: str) -> str:
    """A quantile of what a histogram observed."""
    return f"histogram_quantile({q:g}, {rate(f'{histogram}_bucket', 'le')})"


def spread(histogram: str) -> dict[str, str]:
    """Mean and quantiles of a histogram."""
    return {
        "mean": mean(histogram),
        "p10": quantile(0.1, histogram),
        "p50": quantile(0.5, histogram),
        "p90": quantile(0.9, histogram),
    }


def by_engine(gauge: str) -> str:
    """A gauge of each engine."""
    return f"{gauge}{{{_SERIES}}}"


ROWS: dict[str, Sequence[Panel]] = {
    "Depth": (
        Panel("Budget of finished requests", spread("vllm_buddy:budget"), unit="percentunit", most=1),
        Panel(
            'Budget that "auto" chose',
            spread("vllm_buddy:auto_budget"),
            "Of requests that left the choice to the server. Empty without a Budget Predictor.",
            "percentunit",
            1,
        ),
        Panel(
            "Share of layers skipped",
            {
                "skipped": f"{rate('vllm_buddy:layer_tokens_skipped_total')} / "
                f"({rate('vllm_buddy:layer_tokens_skipped_total')} + {rate('vllm_buddy:layer_tokens_executed_total')})"
            },
            "Of all layers of all tokens.",
            "percentunit",
            1,
        ),
        Panel("Layers executed per token", spread("vllm_buddy:layers_executed"), "Of finished requests."),
        Panel(
            "Layers run per step",
            {**spread("vllm_buddy:step_layers"), "mean per token": mean("vllm_buddy:layers_executed")},
            "The union of the paths of a batch. Decoding pays for the union, so the closer it is to the layers per "
            "token, the more of the skipping is saved time.",
        ),
        Panel(
            "Changes of path per decision",
            {"changes": share("vllm_buddy:reroutes_total", "vllm_buddy:decisions_total")},
            unit="percentunit",
        ),
    ),
    "Load": (
        Panel(
            "Load and price",
            {
                "load, engine {{engine}}": by_engine("vllm_buddy:load"),
                "price, engine {{engine}}": by_engine("vllm_buddy:auto_price"),
            },
            "The price, in nats per token for all layers, follows the load from 0 to 1. "
            "Empty without a Budget Predictor.",
        ),
        Panel(
            "Service objectives",
            {
                "{{objective}}, p99, engine {{engine}}": by_engine("vllm_buddy:slo_observed_seconds"),
                "{{objective}}, objective": by_engine("vllm_buddy:slo_objective_seconds"),
            },
            "As the scheduler measures them. Empty without the setting slo.",
            "s",
        ),
        Panel(
            "Requests",
            {
                "running, engine {{engine}}": by_engine("vllm:num_requests_running"),
                "waiting, engine {{engine}}": by_engine("vllm:num_requests_waiting"),
            },
        ),
        Panel("Generated tokens per second", {"tokens": rate("vllm:generation_tokens_total")}),
        Panel(
            "Time between tokens",
            {
                "p50": quantile(0.5, "vllm:inter_token_latency_seconds"),
                "p99": quantile(0.99, "vllm:inter_token_latency_seconds"),
            },
            unit="s",
        ),
        Panel(
            "Time to the first token",
            {
                "p50": quantile(0.5, "vllm:time_to_first_token_seconds"),
                "p99": quantile(0.99, "vllm:time_to_first_token_seconds"),
            },
            unit="s",
        ),
        Panel(
            "Time to route a request or a step",
            {
                "mean": mean("vllm_buddy:routing_seconds"),
                "p99": quantile(0.99, "vllm_buddy:routing_seconds"),
            },
            "On the host, before the step.",
            "s",
        ),
    ),
    "Cache and drafts": (
        Panel(
            "Prompt tokens found in the prefix cache, by budget",
            {
                "up to {{budget}}": share(
                    "vllm_buddy:prompt_tokens_cached_total", "vllm_buddy:prompt_tokens_total", "budget"
                )
            },
            "A prefix is shared by requests of one path, so budgets that are rare find little.",
            "percentunit",
            1,
        ),
        Panel(
            "KV cache in use",
            {"engine {{engine}}": by_engine("vllm:kv_cache_usage_perc")},
            unit="percentunit",
            most=1,
        ),
        Panel(
            "Drafts accepted",
            {
                "all drafts": share(
                    "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_draft_tokens_total"
                ),
                "made on the model's layers": share(
                    "vllm_buddy:depth_drafts_accepted_total", "vllm_buddy:depth_drafts_total"
                ),
            },
            "Empty without a speculator.",
            "percentunit",
            1,
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's format."""
    panels: list[dict[str, Any]] = []
    top, width = 0, _WIDTH // _PANELS_PER_ROW
    for title, row in ROWS.items():
        at = {"x": 0, "y": top, "w": _WIDTH, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": at, "panels": []})
        top += 1
        for index, panel in enumerate(row):
            at = {
                "x": index % _PANELS_PER_ROW * width,
                "y": top + index // _PANELS_PER_ROW * _HEIGHT,
                "w": width,
                "h": _HEIGHT,
            }
            panels.append(_graph(panel, len(panels) + 1, at))
        top += -(-len(row) // _PANELS_PER_ROW) * _HEIGHT
    return {
        "uid": "vllm-buddy",
        "title": "vllm_buddy",
        "tags": ["vllm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_source(), _choice("model", "model_name"), _choice("engine", "engine")]},
        "panels": panels,
    }


def _graph(panel: Panel, number: int, at: dict[str, int]) -> dict[str, Any]:
    limits = {"min": 0} | ({} if panel.most is None else {"max": panel.most})
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "gridPos": at,
        "fieldConfig": {"defaults": {"unit": panel.unit, **limits}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": expression, "legendFormat": legend}
            for index, (legend, expression) in enumerate(panel.lines.items())
        ],
    }


def _source() -> dict[str, Any]:
    return {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _choice(name: str, label: str) -> dict[str, Any]:
    """A variable with the values of a label, all of them at first."""
    return {
        "name": name,
        "type": "query",
        "datasource": _SOURCE,
        "query": f"label_values(vllm_buddy:budget_count, {label})",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.dashboard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file is not up to date")
    args = parser.parse_args()
    text = json.dumps(dashboard(), indent=2) + "\n"
    if args.check:
        return int(not DASHBOARD.is_file() or DASHBOARD.read_text() != text)
    DASHBOARD.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
