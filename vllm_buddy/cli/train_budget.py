"""`vllm-buddy train-budget`: runs stage 2 of training, which adds a Budget Predictor to an artifact."""

import argparse
import shlex
from typing import Any

from vllm_buddy.cli.config_arguments import add_config_arguments, config_and_overrides, given_words, list_settings
from vllm_buddy.cli.device_memory import says_what_saves_memory
from vllm_buddy.cli.progress import note
from vllm_buddy.errors import TrainingError

SHOWN_EVERY = 100  # steps between two lines of progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a configuration file, and settings that override it."""
    add_config_arguments(parser)


@says_what_saves_memory("lower prompt, context or answer, or set dtype=bfloat16")
def run(args: argparse.Namespace) -> int:
    """Measure losses, train the predictor and write the artifact; returns 0.

    Raises:
        BuddyError: a setting, the data, the artifact or the model cannot be used.
    """
    from vllm_buddy.training.stage2_settings import Stage2Settings

    if args.list:
        return list_settings(Stage2Settings)
    from vllm_buddy.training.settings_file import read_settings_file

    settings = read_settings_file(Stage2Settings, *config_and_overrides(args))
    from vllm_buddy.artifact import identify, resolve_artifact
    from vllm_buddy.artifact.provenance import source_commit
    from vllm_buddy.models.find import find_model
    from vllm_buddy.training.stage2 import run_stage2
    from vllm_buddy.training.stage2_record import finish_run

    commit = source_commit()
    model_dir = find_model(settings.model, note)
    folder = resolve_artifact(settings.artifact, lambda: identify(model_dir))
    log: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        log.append(row)
        if row["step"] % SHOWN_EVERY == 0:
            note(
                f"step {row['step']}/{settings.steps}  held out {row['held_out']:.4f}  entropy {row['entropy']:.3f}  "
                f"budget {row['budget']:.3f}"
            )

    stage = run_stage2(settings, folder, model_dir, report, note)
    command = shlex.join(["vllm-buddy", "train-budget", *given_words(args)])
    try:
        finish_run(stage, folder, log, settings, command, commit)
    except OSError as error:
        raise TrainingError(f"cannot write to {settings.out}: {error}; run the same command again") from None
    gain = stage.gain
    print(
        f"On held-out samples, {gain.layers:.1f} layers on average have a loss of {gain.loss:.4f} nats per token; the "
        f"best constant budget has {gain.constant:.4f}, and the best choice in hindsight has {gain.best:.4f}."
    )
    print(f"wrote artifact '{stage.artifact.config.name}' to {settings.out}")
    return 0
