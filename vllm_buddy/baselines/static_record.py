"""Writes the text files of a statically pruned artifact: the model card README.md and the record run.yaml."""

import json
from typing import Any

from vllm_buddy.artifact.provenance import card_origin, card_title, run_header, to_yaml
from vllm_buddy.baselines.pruning import CHECKPOINT_DIR, PrunedModel
from vllm_buddy.baselines.static_settings import PruneSettings


def model_card(pruned: PrunedModel, settings: PruneSettings) -> str:
    """Return README.md of the artifact."""
    base = pruned.base
    order = pruned.measured
    source = (
        "by position"
        if order is None
        else f"measured on the first {order.num_tokens:,} tokens of {order.calibration} in windows of {order.window}"
    )
    lines = [
        *card_title(pruned.artifact.config.name, base.id),
        f"Static pruning of {base.id} ({base.architecture}, {base.num_layers} layers, fingerprint "
        f"`{base.fingerprint}`), for serving with vllm_buddy.",
        "",
        "**Nothing here is trained**, and nothing makes up for the layers that are left out. Every request of one "
        "budget runs the same layers. The base model's weights are not in the artifact.",
        "",
        f"Method: `{settings.method}`, {source}. First and last layer always run. The others leave in this order:",
        "",
        f"    {' '.join(map(str, pruned.order))}",
        "",
        f"`../{CHECKPOINT_DIR}`, where it is there, is a checkpoint of {len(pruned.layers)} of these layers for stock "
        "vLLM:",
        "",
        f"    {' '.join(map(str, pruned.layers))}",
        "",
        *card_origin(settings.command()),
    ]
    return "\n".join(lines) + "\n"


def run_record(pruned: PrunedModel, settings: PruneSettings, commit: str | None) -> str:
    """Return run.yaml: every setting, the order and its origin, versions and date.

    commit: see provenance.source_commit.
    """
    measured = {} if pruned.measured is None else pruned.measured.model_dump(exclude={"method", "layers"})
    record: dict[str, Any] = {
        **run_header(settings.command(), commit, settings.seed if settings.method == "random" else None),
        "settings": json.loads(settings.model_dump_json()),
        "base_model": pruned.base.model_dump(),
        "order": {"method": settings.method, **measured, "layers": pruned.order},
        "kept": pruned.layers,
    }
    return to_yaml(record)
