"""Writes the files of stage 2 beside an artifact: log, curves, and its sections of the model card and run.yaml."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_buddy.artifact.provenance import PREDICTOR_KEY, add_section, run_header
from vllm_buddy.training.curves import pyplot
from vllm_buddy.training.stage2 import Stage2
from vllm_buddy.training.stage2_settings import Stage2Settings

LOG_FILE = "budget_log.jsonl"
CURVES_FILE = "budget_curves.png"
CARD_HEADING = "## Budget Predictor"


def finish_run(
    stage: Stage2,
    artifact_dir: Path,
    log: Sequence[dict[str, Any]],
    settings: Stage2Settings,
    command: str,
    commit: str | None,
) -> None:
    """Write the artifact to `settings.out`, with the card and record of `artifact_dir` plus a predictor section."""
    artifact, out = stage.artifact, settings.out
    assert artifact.config.predictor is not None
    artifact.save(out)
    (out / LOG_FILE).write_text("".join(f"{json.dumps(row)}\n" for row in log))
    draw_curves(log, out / CURVES_FILE, f"{artifact.config.name}: Budget Predictor")
    record = {
        **run_header(command, commit, settings.seed),
        "settings": json.loads(settings.model_dump_json(exclude={"data", "data_dir", "cache_dir", "out"})),
        "data": {
            source.file.name: {
                "sha256": stage.sha256[source.file.name],
                "weight": source.weight,
                "share": source.share,
            }
            for source in settings.data
        },
        "samples": stage.num_samples,
        "held_out": {
            "mean_layers": round(stage.gain.layers, 3),
            "loss": round(stage.gain.loss, 4),
            "constant_budget": round(stage.gain.constant, 4),
            "best_choice": round(stage.gain.best, 4),
            "stderr_of_gain": round(stage.gain.stderr, 4),
        },
    }
    names = artifact.config.name, artifact.config.base_model.id
    add_section(artifact_dir, out, names, predictor_card(stage, command), PREDICTOR_KEY, record)


def predictor_card(stage: Stage2, command: str) -> str:
    """Return the section of the model card about the predictor."""
    config = stage.artifact.config.predictor
    assert config is not None
    num_layers = stage.artifact.config.base_model.num_layers
    lines = [
        CARD_HEADING,
        "",
        '`"buddy_budget": "auto"` lets a Budget Predictor choose among '
        f"{', '.join(map(str, config.depths))} of {num_layers} layers, from the prompt and a price of compute in nats "
        f"per token for all layers. The artifact's price is {config.price:g}. What prices come to, on requests that "
        "were not trained on:",
        "",
        "| price | mean budget |",
        "| --- | --- |",
        *(f"| {point.price:g} | {point.budget:.3f} |" for point in config.prices),
        "",
        f"At its own price {stage.gain.layers:.1f} layers on average lose {stage.gain.loss:.3f} nats per token where "
        f"the best constant budget loses {stage.gain.constant:.3f} (saved {stage.gain.gain:.3f}, standard error "
        f"{stage.gain.stderr:.3f}) and the best choice in hindsight {stage.gain.best:.3f}.",
        "",
        f"    {command}",
        "",
    ]
    return "\n".join(lines) + "\n"


def draw_curves(log: Sequence[dict[str, Any]], out: Path, title: str) -> None:
    """Draw held-out cost, entropy of the policy and chosen budget against optimizer steps.

    Raises:
        TrainingError: matplotlib is not installed.
    """
    plt = pyplot()
    steps = [row["step"] for row in log]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axis, (keys, label) in zip(
        axes,
        (
            (("held_out",), "loss + price x budget, held out (nats)"),
            (("entropy",), "entropy of the policy (nats)"),
            (("budget", "budget_stdev"), "chosen budget, held out"),
        ),
    ):
        for key in keys:
            axis.plot(steps, [row[key] for row in log], label={"budget": "mean", "budget_stdev": "spread"}.get(key))
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    axes[-1].set_ylim(bottom=0)
    axes[-1].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(out, dpi=130)
    plt.close(figure)
