"""Writes the files beside an artifact of stage 1: the model card, the record of the run and the loss curves."""

import json
from typing import Any

import yaml

from vllm_buddy.artifact import Artifact, resolve_artifact
from vllm_buddy.artifact.provenance import (
    CARD_FILE,
    DRAFTS_HEADING,
    PREDICTOR_KEY,
    RUN_FILE,
    add_section,
    card_origin,
    card_title,
    run_header,
    section_of,
    to_yaml,
)
from vllm_buddy.method import depth_for_budget, layers_of, top_k_path
from vllm_buddy.training import draft_record, stage2_record
from vllm_buddy.training.curves import CURVES_FILE, draw_curves, read_log
from vllm_buddy.training.loop import LOG_FILE, TrainingRun
from vllm_buddy.training.sources import DatasetSource, Source
from vllm_buddy.training.stage1_settings import Stage1Settings

_REPAIRS = {
    "bypass": "A low-rank bypass of rank {rank} stands in for each layer that is skipped; the base model's weights are "
    "not in the artifact and are not changed, so budget 1.0 is the base model exactly.",
    "distill": "LoRA of rank {rank} on all linear layers, distilled from the full model, is merged into the base model "
    "when it is loaded; it acts at every budget, 1.0 included.",
    "paper": "LoRA of rank {rank} on all linear layers, trained by next-token cross-entropy as BUDDY describes it, is "
    "merged into the base model when it is loaded; it acts at every budget, 1.0 included.",
}


def finish_run(
    artifact: Artifact, run: TrainingRun, settings: Stage1Settings, command: str, commit: str | None
) -> None:
    """Write the artifact, its model card, run.yaml and the loss curves to the folder of the run."""
    artifact.save(settings.out)
    draw_curves(settings.out / LOG_FILE, settings.out / CURVES_FILE, f"{artifact.config.name}: {settings.recipe}")
    log = read_log(settings.out / LOG_FILE)
    trained = settings.explored_tokens + log[-1]["tokens"]  # more than `tokens` if those were lowered too late
    (settings.out / CARD_FILE).write_text(model_card(artifact, settings, command, trained))
    record: dict[str, Any] = {
        **run_header(command, commit, settings.seed),
        "settings": json.loads(settings.model_dump_json(exclude={"data", "data_dir", "cache_dir", "out"})),
        "data": {source.name: {"sha256": run.corpus.sha256[source.name], **_how(source)} for source in settings.data},
        "trained_tokens": trained,
        "started_from": run.started_from,
        "lengths": [{"from_step": step, "tokens": tokens} for step, tokens in run.lengths],
        "base_model": artifact.config.base_model.model_dump(),
        "last_loss": round(sum(row["loss"] for row in log[-20:]) / len(log[-20:]), 4),
        "training_seconds": log[-1]["seconds"],
        "router_fit": run.router_figures,
    }
    (settings.out / RUN_FILE).write_text(to_yaml(record))
    if artifact.drafts:
        _keep_record(artifact, settings, DRAFTS_HEADING, draft_record.RUN_KEY)
    if artifact.predictor is not None:
        _keep_record(artifact, settings, stage2_record.CARD_HEADING, PREDICTOR_KEY)


def _keep_record(artifact: Artifact, settings: Stage1Settings, heading: str, key: str) -> None:
    """Write to card and record what those of the artifact that training started from say of a part that was kept."""
    source = resolve_artifact(settings.start_from, lambda: artifact.config.base_model)
    card, run = ((source / name).read_text() if (source / name).is_file() else "" for name in (CARD_FILE, RUN_FILE))
    section = section_of(card, heading) or f"{heading}\n\nThat of {settings.start_from}, which has no model card.\n\n"
    names = artifact.config.name, artifact.config.base_model.id
    add_section(settings.out, settings.out, names, section, key, (yaml.safe_load(run) or {}).get(key, {}))


def _how(source: Source) -> dict[str, Any]:
    """How a source was read."""
    if isinstance(source, DatasetSource):
        return source.model_dump(exclude_none=True)
    return {"weight": source.weight, "share": source.share}


def _token_lines(artifact: Artifact) -> list[str]:
    """What the model card says of schedule `token`."""
    if artifact.token is None:
        return []
    depths = ", ".join(map(str, artifact.token.depths))
    return [
        "",
        f"With the schedule `token` each token runs {depths} layers, chosen from the token and those before it; the "
        "budget is a mean over the tokens of a request then.",
    ]


def model_card(artifact: Artifact, settings: Stage1Settings, command: str, trained_tokens: int) -> str:
    """Return the README.md of a trained artifact. trained_tokens: of all its steps, those of earlier runs included."""
    config = artifact.config
    base = config.base_model
    smallest = depth_for_budget(settings.min_budget, base.num_layers)
    static = layers_of(top_k_path(artifact.prior, smallest))
    routed = (
        "A Decision Module picks each request's path from its tokens."
        if config.has_decision_module
        else "There is no Decision Module: every request of one budget runs the same layers."
    )
    trained = f"Trained on {trained_tokens:,} tokens of {', '.join(source.name for source in settings.data)}"
    if settings.start_from is not None:
        trained += f", from the bypass of {settings.start_from} on"
    lines = [
        *card_title(config.name, base.id),
        f"Dynamic depth for {base.id} ({base.architecture}, {base.num_layers} layers, fingerprint "
        f"`{base.fingerprint}`), for serving with vllm_buddy. One artifact serves every budget from "
        f"{settings.min_budget:g} to 1.",
        "",
        f"{_REPAIRS[settings.recipe].format(rank=settings.rank)} {routed}",
        *_token_lines(artifact),
        "",
        f"{trained}. With the least budget the static path runs layers {', '.join(map(str, static))}.",
        "",
        "`vllm-buddy eval --model MODEL --artifact DIR --policy buddy --text FILE --piqa FILE` measures what that is "
        "worth.",
        "",
        DRAFTS_HEADING,
        "",
        "There are none: lossless mode drafts on paths of the library, without adapters. `vllm-buddy train-drafts` "
        "makes some.",
        "",
        *card_origin(command, f"every setting, the hashes of the data, and versions; `{CURVES_FILE}` shows the loss"),
    ]
    return "\n".join(lines) + "\n"
