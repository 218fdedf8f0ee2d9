"""Writes the generated parts of README.md, docs/ and the shipped artifacts' model cards.

The settings table comes from the settings schema, the figures from the results files.

    python -m tools.readme            # rewrite
    python -m tools.readme --check    # exit 1 if a page is not up to date
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tools.tables import auto, drafts, front, memory, peers, quality, speed, steps, vllm_tests
from tools.tables.results import ROOT, table

if TYPE_CHECKING:
    from vllm_buddy.serving.telemetry.families import Family

CARD = ROOT / "vllm_buddy" / "shipped" / "smollm2-135m" / "README.md"
TOKEN_CARD = CARD.parent.with_name("smollm2-135m-token") / CARD.name


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is not up to date")
    args = parser.parse_args()
    stale = False
    for path, names in PAGES.items():
        old = path.read_text()
        new = generate(old, names, path.name)
        stale |= old != new
        if not args.check:
            path.write_text(new)
    return int(stale and args.check)


def generate(text: str, names: Sequence[str], page: str) -> str:
    """Return `text` with the parts between the markers generated again."""
    for name in names:
        pattern = re.compile(rf"(<!-- begin {name} .*?-->\n).*?(<!-- end {name} -->)", re.DOTALL)
        body = SECTIONS[name]().rstrip() + "\n"
        text, found = pattern.subn(lambda m, body=body: m[1] + body + m[2], text)  # type: ignore[misc]
        if found != 1:
            raise SystemExit(f"{page} has {found} parts named {name}")
    return text


def settings_table() -> str:
    """Return a table with one row per server setting, those of a section as `section.name`."""
    from vllm_buddy.serving.start.settings import known_settings

    rows = []
    for name, field in known_settings().items():
        default = "" if field.default is None or field.is_required() else f"`{json.dumps(field.default)}`"
        rows.append([f"`{name}`", default, str(field.description)])
    return "\n".join(table(["key", "default", "meaning"], rows))


def metrics_table() -> str:
    """Return a table with one row per metric of the plugin."""
    from vllm_buddy.serving.telemetry.families import families

    rows = []
    kinds: dict[str, dict[str, Any]] = {
        "": {},
        'with budget "auto"': {"has_auto": True},
        "with `slo`": {"objectives": ("itl", "ttft")},
        "with lossless drafts": {"lossless": True},
    }
    seen: set[str] = set()
    for where, kind in kinds.items():
        found = [f for f in families(1, **{"has_auto": False, "lossless": False, **kind}) if f.name not in seen]
        seen |= {family.name for family in found}
        rows += [_metric_row(family, where) for family in found]
    return "\n".join(table(["metric", "kind", "meaning", "where"], rows))


def _metric_row(family: "Family", where: str) -> list[str]:
    label = f", by `{family.label}`" if family.label else ""
    return [f"`vllm_buddy:{family.name}`", family.kind + label, family.description, where]


SECTIONS: dict[str, Callable[[], str]] = {
    "claims": front.claims,
    "speed at a glance": front.speed_at_a_glance,
    "quality at a glance": front.quality_at_a_glance,
    "settings": settings_table,
    "metrics": metrics_table,
    "prices": auto.prices_table,
    "decode": speed.decode_table,
    "prefill": speed.prefill_table,
    "second model": speed.second_model_table,
    "mixed": speed.mixed_table,
    "quantised": speed.quantised_table,
    "schedules": speed.schedules_table,
    "serving": speed.serving_table,
    "overload": auto.overload_table,
    "overload with an objective": auto.overload_objective_table,
    "objectives": auto.objectives_table,
    "profile": steps.profile_table,
    "union": steps.union_table,
    "peers": peers.peers_table,
    "capabilities": peers.capabilities_table,
    "replicas": speed.replicas_table,
    "memory": speed.memory_table,
    "max budget": speed.max_budget_table,
    "kv capacity": memory.capacity_table,
    "kv pressure": memory.pressure_table,
    "kv pace": memory.pace_table,
    "conversations": memory.conversations_table,
    "full prompt": memory.full_prompt_table,
    "start": speed.start_table,
    "layer calls": speed.layer_calls_table,
    "quality": quality.quality_table,
    "token": quality.token_table,
    "other text": quality.other_text_table,
    "own model": quality.own_model_table,
    "routing": quality.routing_table,
    "copying": quality.copying_table,
    "qwen": quality.qwen_table,
    "recipes": quality.recipes_table,
    "static": quality.static_table,
    "auto": auto.auto_table,
    "speculation": drafts.speculation_table,
    "second model's speculation": drafts.second_model_speculation_table,
    "profile of exits": drafts.profile_exits_table,
    "profile of depths": drafts.profile_depths_table,
    "profile of speed-ups": drafts.profile_speedups_table,
    "profile of a larger shape": drafts.profile_shape_table,
    "vllm tests": vllm_tests.passed_table,
    "vllm test differences": vllm_tests.differences_table,
    "vllm tests left out": vllm_tests.left_out_table,
}
DOCS = ROOT / "docs"
PAGES = {
    ROOT / "README.md": ["claims", "speed at a glance", "quality at a glance"],
    DOCS / "operations.md": ["metrics"],
    DOCS / "serving.md": ["prices"],
    DOCS / "settings.md": ["settings"],
    DOCS / "quality.md": ["token", "routing", "quality", "copying", "other text", "qwen", "auto", "recipes", "static"],
    DOCS / "own_model.md": ["own model"],
    DOCS / "benchmarks.md": [
        "decode",
        "mixed",
        "prefill",
        "second model",
        "quantised",
        "schedules",
        "serving",
        "overload",
        "overload with an objective",
        "objectives",
        "profile",
        "start",
        "layer calls",
        "memory",
        "union",
        "peers",
        "capabilities",
    ],
    DOCS / "speculation.md": [
        "speculation",
        "second model's speculation",
        "profile of depths",
        "profile of exits",
        "profile of speed-ups",
        "profile of a larger shape",
    ],
    DOCS / "max_budget.md": ["max budget"],
    DOCS / "replicas.md": ["replicas"],
    DOCS / "memory.md": ["kv capacity", "kv pressure", "kv pace", "conversations", "full prompt"],
    DOCS / "vllm_tests.md": ["vllm tests", "vllm test differences", "vllm tests left out"],
    CARD: ["quality"],
    TOKEN_CARD: ["token"],
}

if __name__ == "__main__":
    sys.exit(main())
