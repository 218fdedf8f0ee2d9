"""Writes the text files of an untrained artifact: the model card README.md and the record run.yaml."""

import json
from typing import Any

from vllm_buddy.artifact.provenance import card_origin, card_title, run_header, to_yaml
from vllm_buddy.importance.base import INDICATORS
from vllm_buddy.importance.build import PriorResult
from vllm_buddy.importance.prior_settings import PriorSettings
from vllm_buddy.method import depth_for_budget


def model_card(result: PriorResult, settings: PriorSettings) -> str:
    """Return README.md of the artifact."""
    config = result.artifact.config
    base = config.base_model
    chosen = config.prior.indicator
    order = (int(i) + 1 for i in result.artifact.prior.argsort(kind="stable"))
    library = f", and a path library of up to {settings.library} paths per depth" if config.library else ""
    lines = [
        *card_title(config.name, base.id),
        f"A routing prior for {base.id} ({base.architecture}, {base.num_layers} layers, fingerprint "
        f"`{base.fingerprint}`), for serving with vllm_buddy.",
        "",
        "**Nothing here is trained.** There is no Decision Module: every request of one budget runs the same layers, "
        "the most important ones by a static measure. Expect the text to suffer as soon as layers are left out. The "
        "artifact holds the prior" + library + "; the base model's weights are not in it.",
        "",
        f"Indicator: `{chosen}` ({INDICATORS[chosen].title}), measured on the first {config.prior.num_tokens:,} tokens "
        f"of {config.prior.calibration} in windows of {settings.window}. First and last layer always run. The others "
        "leave in this order:",
        "",
        f"    {' '.join(map(str, order))}",
        "",
        *_perplexity_section(result, settings),
        *card_origin(settings.command()),
    ]
    return "\n".join(lines) + "\n"


def run_record(result: PriorResult, settings: PriorSettings, commit: str | None) -> str:
    """Return run.yaml: every setting, the data, versions and date. commit: see provenance.source_commit."""
    record: dict[str, Any] = {
        **run_header(settings.command(), commit, seed=None),
        "settings": json.loads(settings.model_dump_json()),
        "text": {"name": result.text.name, "sha256": result.text.sha256},
        "base_model": result.artifact.config.base_model.model_dump(),
        "perplexity": {
            name: {f"{budget:g}": round(value, 4) for budget, value in row.items()}
            for name, row in result.perplexity.items()
        },
    }
    return to_yaml(record)


def _perplexity_section(result: PriorResult, settings: PriorSettings) -> list[str]:
    if not result.perplexity:
        return []
    num_layers = result.artifact.config.base_model.num_layers
    budgets = list(next(iter(result.perplexity.values())))
    chosen = result.artifact.config.prior.indicator
    rows = [
        [f"`{name}`" + (" (this artifact)" if name == chosen else ""), *(f"{row[b]:,.1f}" for b in budgets)]
        for name, row in result.perplexity.items()
    ]
    header = ["indicator", *(f"budget {b:g} ({depth_for_budget(b, num_layers)} layers)" for b in budgets)]
    return [
        "## Perplexity",
        "",
        f"On the {settings.heldout:,} tokens of {result.text.name} that follow the calibration part, in windows of "
        f"{settings.window} tokens scored each by itself, KV policy `masked`, {settings.dtype}. Lower is better.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)),
        "",
    ]
