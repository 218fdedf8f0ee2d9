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
_SERIES = 'model_name=~"$model",instance=~"$instance",engine=~"$engine"'
_SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True)
class Panel:
    """A graph. lines: legend -> expression in PromQL. unit: Grafana's name of it; most: end of the axis.

    heat: a map of the buckets of a histogram over time, with one expression, by `le`.
    """

    title: str
    lines: dict[str, str]
    description: str = ""
    unit: str = "none"
    most: float | None = None
    heat: bool = False


def rate(metric: str, by: str = "instance") -> str:
    """Growth of a counter per second, summed over series. by: labels that are kept, with commas; "": none."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{{{_SERIES}}}[$__rate_interval]))"


def share(part: str, whole: str, by: str = "instance") -> str:
    """What share of one counter's growth another one's is."""
    return f"{rate(part, by)} / {rate(whole, by)}"


def mean(histogram: str) -> str:
    """Mean of what a histogram observed, of each server."""
    return share(f"{histogram}_sum", f"{histogram}_count")


def quantile(q: float, histogram: str) -> str:
    """A quantile of what a histogram of times observed, of each server. It is interpolated within a bucket."""
    return f"histogram_quantile({q:g}, {rate(f'{histogram}_bucket', 'instance,le')})"


def distribution(title: str, histogram: str, of: str, description: str = "") -> Panel:
    """The share of observations in each bucket, of all servers that are chosen.

    Not quantiles: these are interpolated within a bucket, so that requests that all ran 1.0 have a median of 0.95.
    """
    shares = f"{rate(f'{histogram}_bucket', 'le')} / on() group_left {rate(f'{histogram}_count', '')}"
    named = f"Share of {of} in each bucket, which is named by its upper end. {description}".rstrip()
    return Panel(title, {"{{le}}": shares}, named, "percentunit", heat=True)


def by_engine(gauge: str) -> str:
    """A gauge of each engine."""
    return f"{gauge}{{{_SERIES}}}"


ROWS: dict[str, Sequence[Panel]] = {
    "Depth": (
        distribution("Budget of finished requests", "vllm_buddy:budget", "finished requests"),
        distribution(
            'Budget that "auto" chose',
            "vllm_buddy:auto_budget",
            "finished requests that left the choice to the server",
            "Empty without a Budget Predictor.",
        ),
        Panel(
            "Mean budget",
            {
                "{{instance}}": mean("vllm_buddy:budget"),
                '{{instance}}, chosen by "auto"': mean("vllm_buddy:auto_budget"),
            },
            "Of finished requests.",
            "percentunit",
            1,
        ),
        distribution("Layers executed per token", "vllm_buddy:layers_executed", "finished requests"),
        distribution(
            "Layers run per step",
            "vllm_buddy:step_layers",
            "steps",
            "The union of the paths of a batch.",
        ),
        Panel(
            "Mean layers",
            {
                "{{instance}}, per token": mean("vllm_buddy:layers_executed"),
                "{{instance}}, per step": mean("vllm_buddy:step_layers"),
            },
            "Decoding pays for the union of a batch's paths, so the closer the layers of a step are to those of a "
            "token, the more of the skipping is saved time.",
        ),
        Panel(
            "Share of layers skipped",
            {
                "{{instance}}": f"{rate('vllm_buddy:layer_tokens_skipped_total')} / "
                f"({rate('vllm_buddy:layer_tokens_skipped_total')} + {rate('vllm_buddy:layer_tokens_executed_total')})"
            },
            "Of all layers of all tokens.",
            "percentunit",
            1,
        ),
        Panel(
            "Changes of path per decision",
            {"{{instance}}": share("vllm_buddy:reroutes_total", "vllm_buddy:decisions_total")},
            unit="percentunit",
        ),
    ),
    "Load": (
        Panel(
            "Load, price and ceiling",
            {
                "load, {{instance}}, engine {{engine}}": by_engine("vllm_buddy:load"),
                "price, {{instance}}, engine {{engine}}": by_engine("vllm_buddy:auto_price"),
                "largest budget under slo, {{instance}}, engine {{engine}}": by_engine("vllm_buddy:slo_largest_budget"),
            },
            "The price, in nats per token for all layers, follows the load from 0 to 1; with slo, a ceiling does. "
            "Empty without a Budget Predictor.",
        ),
        Panel(
            "Service objectives",
            {
                "{{objective}}, p99, {{instance}}, engine {{engine}}": by_engine("vllm_buddy:slo_observed_seconds"),
                "{{objective}}, objective, {{instance}}, engine {{engine}}": by_engine(
                    "vllm_buddy:slo_objective_seconds"
                ),
            },
            "As the scheduler measures them. Empty without the setting slo.",
            "s",
        ),
        Panel(
            "Requests",
            {
                "running, {{instance}}, engine {{engine}}": by_engine("vllm:num_requests_running"),
                "waiting, {{instance}}, engine {{engine}}": by_engine("vllm:num_requests_waiting"),
            },
        ),
        Panel("Generated tokens per second", {"{{instance}}": rate("vllm:generation_tokens_total")}),
        Panel(
            "Time between tokens",
            {
                "p50, {{instance}}": quantile(0.5, "vllm:inter_token_latency_seconds"),
                "p99, {{instance}}": quantile(0.99, "vllm:inter_token_latency_seconds"),
            },
            unit="s",
        ),
        Panel(
            "Time to the first token",
            {
                "p50, {{instance}}": quantile(0.5, "vllm:time_to_first_token_seconds"),
                "p99, {{instance}}": quantile(0.99, "vllm:time_to_first_token_seconds"),
            },
            unit="s",
        ),
        Panel(
            "Time to route a request or a step",
            {
                "mean, {{instance}}": mean("vllm_buddy:routing_seconds"),
                "p99, {{instance}}": quantile(0.99, "vllm_buddy:routing_seconds"),
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
            "Of all servers that are chosen. A prefix is shared by requests of one path, so budgets that are rare find "
            "little.",
            "percentunit",
            1,
        ),
        Panel(
            "KV cache in use",
            {"{{instance}}, engine {{engine}}": by_engine("vllm:kv_cache_usage_perc")},
            unit="percentunit",
            most=1,
        ),
        Panel(
            "Drafts accepted",
            {
                "all drafts, {{instance}}": share(
                    "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_draft_tokens_total"
                ),
                "made on the model's layers, {{instance}}": share(
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
        "templating": {
            "list": [
                _source(),
                _choice("model", "model_name"),
                _choice("instance", "instance"),
                _choice("engine", "engine"),
            ]
        },
        "panels": panels,
    }


def _graph(panel: Panel, number: int, at: dict[str, int]) -> dict[str, Any]:
    limits = {"min": 0} | ({} if panel.most is None else {"max": panel.most})
    form = {"format": "heatmap"} if panel.heat else {}  # Grafana takes the differences between cumulative buckets
    return {
        "id": number,
        **(_heat(panel.unit) if panel.heat else {"type": "timeseries"}),
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "gridPos": at,
        "fieldConfig": {"defaults": {"unit": panel.unit, **limits}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": expression, "legendFormat": legend, **form}
            for index, (legend, expression) in enumerate(panel.lines.items())
        ],
    }


def _heat(unit: str) -> dict[str, Any]:
    """A map whose rows are buckets; shares have the same colour in all of them."""
    return {
        "type": "heatmap",
        "options": {
            "calculate": False,
            "cellValues": {"unit": unit},
            "color": {"mode": "scheme", "scheme": "Blues", "steps": 64, "min": 0, "max": 1},
            "rowsFrame": {"layout": "auto"},
            "tooltip": {"mode": "single", "yHistogram": True},
            "yAxis": {"axisPlacement": "left"},
        },
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
