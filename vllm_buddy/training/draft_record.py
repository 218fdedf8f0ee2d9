"""Writes the files of `vllm-buddy train-drafts` beside an artifact: log, and sections of model card and run.yaml."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_buddy.artifact.provenance import DRAFTS_HEADING, add_section, run_header
from vllm_buddy.method import layers_of
from vllm_buddy.training.draft_settings import DraftTrainingSettings
from vllm_buddy.training.draft_training import TrainedDrafts

LOG_FILE = "draft_log.jsonl"
RUN_KEY = "drafts"


def finish_run(
    trained: TrainedDrafts,
    artifact_dir: Path,
    log: Sequence[dict[str, Any]],
    settings: DraftTrainingSettings,
    command: str,
    commit: str | None,
) -> None:
    """Write the artifact to `settings.out`, with the card and record of `artifact_dir` plus a section on drafts."""
    config, out = trained.artifact.config, settings.out
    trained.artifact.save(out)
    (out / LOG_FILE).write_text("".join(f"{json.dumps(row)}\n" for row in log))
    record = {
        **run_header(command, commit, settings.seed),
        "settings": json.loads(settings.model_dump_json(exclude={"data", "data_dir", "out"})),
        "data": {source.name: {"sha256": trained.sha256[source.name]} for source in settings.data},
        "searched": {
            str(found.depth): {
                "layers": layers_of(found.path),
                **_rounded(found, "divergence", "agreement", "gain"),
            }
            for found in trained.searched
        },
        "held_out": {
            str(draft.path.bit_count()): {
                "before": _rounded(before, "agreement", "divergence"),
                "after": _rounded(after, "agreement", "divergence"),
            }
            for draft, before, after in zip(trained.artifact.drafts, trained.before, trained.after)
        },
    }
    names = config.name, config.base_model.id
    add_section(artifact_dir, out, names, drafts_card(trained, command), RUN_KEY, record)


def drafts_card(trained: TrainedDrafts, command: str) -> str:
    """Return the section of the model card about the exits."""
    rows = [
        f"| {', '.join(map(str, layers_of(draft.path)))} | {before.agreement:.3f} | {after.agreement:.3f} | "
        f"{before.divergence:.3f} | {after.divergence:.3f} |"
        for draft, before, after in zip(trained.artifact.drafts, trained.before, trained.after)
    ]
    among = []
    if (vocabulary := trained.artifact.draft_vocabulary) is not None:
        shares = ", ".join(f"{right.agreement:.3f}" for right in trained.all_tokens)
        among = [
            f"Drafts choose among the {len(vocabulary)} tokens that are most frequent in the training text; among all "
            f"tokens, {shares} would be right after training.",
            "",
        ]
    first = trained.artifact.drafts[0]
    own = "" if first.bypass is None else "a bypass for each gap of the path and "
    lines = [
        DRAFTS_HEADING,
        "",
        f"In lossless mode the first of these paths drafts, with {own}an adapter before the model's last norm, of rank "
        f"{first.adapter.rank}. On text that was not trained on, the share of first drafts that are what the whole "
        "model says, and the divergence in nats per token, before training (the artifact's bypass of each skipped "
        "layer, no adapter) and after it:",
        "",
        "| layers | right, before | after | divergence, before | after |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        *among,
        f"    {command}",
        "",
    ]
    return "\n".join(lines) + "\n"


def _rounded(figures: Any, *names: str) -> dict[str, float]:
    return {name: round(getattr(figures, name), 4) for name in names}
