"""`vllm-buddy train-drafts`: adds exits for lossless mode to an artifact: paths that draft, with what is trained."""

import argparse
import shlex
from typing import Any

from vllm_buddy.cli.config_arguments import add_config_arguments, config_and_overrides, given_words, list_settings
from vllm_buddy.cli.device_memory import says_what_saves_memory
from vllm_buddy.cli.progress import note
from vllm_buddy.cli.train import SHOWN_EVERY
from vllm_buddy.errors import TrainingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a configuration file, and settings that override it."""
    add_config_arguments(parser)


@says_what_saves_memory("lower batch, length, search_tokens or rank, or set dtype=bfloat16")
def run(args: argparse.Namespace) -> int:
    """Search the draft paths, train their exits and write the artifact; returns 0.

    Raises:
        BuddyError: a setting, the data, the artifact or the model cannot be used, or a loss is not finite.
    """
    from vllm_buddy.training.draft_settings import DraftTrainingSettings

    if args.list:
        return list_settings(DraftTrainingSettings)
    from vllm_buddy.training.settings_file import read_settings_file

    settings = read_settings_file(DraftTrainingSettings, *config_and_overrides(args))
    from vllm_buddy.artifact import identify, resolve_artifact
    from vllm_buddy.artifact.provenance import source_commit
    from vllm_buddy.models.find import find_model
    from vllm_buddy.training.draft_record import finish_run
    from vllm_buddy.training.draft_training import train_drafts

    commit = source_commit()
    model_dir = find_model(settings.model, note)
    folder = resolve_artifact(settings.artifact, lambda: identify(model_dir))
    log: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        log.append(row)
        done = row["step"] + 1
        if done % SHOWN_EVERY == 0 or done == settings.num_steps:
            note(f"step {done}/{settings.num_steps}  loss {' '.join(f'{loss:.4f}' for loss in row['losses'])}")

    trained = train_drafts(settings, folder, model_dir, report, note)
    command = shlex.join(["vllm-buddy", "train-drafts", *given_words(args)])
    try:
        finish_run(trained, folder, log, settings, command, commit)
    except OSError as error:
        raise TrainingError(f"cannot write to {settings.out}: {error}; run the same command again") from None
    for draft, before, after in zip(trained.artifact.drafts, trained.before, trained.after):
        print(
            f"{draft.path.bit_count()} layers, on held-out text: {before.agreement:.1%} of first drafts are right "
            f"before training, {after.agreement:.1%} after it ({before.divergence:.3f} and {after.divergence:.3f} nats "
            "per token from the whole model)"
        )
    print(f"wrote artifact '{trained.artifact.config.name}' to {settings.out}")
    return 0
