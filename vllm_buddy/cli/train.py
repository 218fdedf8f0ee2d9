"""`vllm-buddy train`: runs stage 1 of training, from text to an artifact."""

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from vllm_buddy.cli.config_arguments import add_config_arguments, config_and_overrides, given_words, list_settings
from vllm_buddy.cli.device_memory import says_what_saves_memory
from vllm_buddy.cli.progress import note
from vllm_buddy.errors import TrainingError

if TYPE_CHECKING:
    from vllm_buddy.training.dry_run import DryRun
    from vllm_buddy.training.stage1_settings import Stage1Settings

SHOWN_EVERY = 10  # steps between two lines of progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a configuration file, settings that override it, and --dry-run."""
    add_config_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="run a few steps, print what the run takes, and write nothing"
    )


@says_what_saves_memory(
    "lower micro_batch, length or search_tokens, set checkpoint_activations=true, dtype=bfloat16 or "
    "base_quantisation=nf4, or share the base out among devices (shard_base); --dry-run shows what a run takes"
)
def run(args: argparse.Namespace) -> int:
    """Train, or continue a run that was stopped, and write the artifact; returns 0.

    Raises:
        BuddyError: a setting, the data or the model cannot be used, the loss is not finite, or the disk is full.
    """
    from vllm_buddy.training.stage1_settings import Stage1Settings

    if args.list:
        return list_settings(Stage1Settings)
    settings = Stage1Settings.read(*config_and_overrides(args))
    from vllm_buddy.models.find import find_model

    if args.dry_run:
        from vllm_buddy.training.dry_run import dry_run

        found = dry_run(settings, find_model(settings.model, note))
        from accelerate import PartialState

        if PartialState().is_main_process:
            print("\n".join(_summary(found, settings)))
        return 0
    from vllm_buddy.artifact.provenance import source_commit
    from vllm_buddy.training.stage1 import run_stage1
    from vllm_buddy.training.stage1_record import finish_run

    commit = source_commit()
    artifact, stage = run_stage1(settings, find_model(settings.model, note), _progress, note)
    if stage.accelerator.is_main_process:
        command = shlex.join(["vllm-buddy", "train", *given_words(args)])
        try:
            finish_run(artifact, stage, settings, command, commit)
        except OSError as error:
            raise TrainingError(
                f"cannot write to {settings.out}: {error}; the checkpoint is intact, so run the same command again"
            ) from None
        print(f"wrote artifact '{artifact.config.name}' to {settings.out}")
    stage.accelerator.wait_for_everyone()  # the launcher ends all processes when one of them fails as it exits
    return 0


def _summary(run: "DryRun", settings: "Stage1Settings") -> list[str]:
    """Return the lines of --dry-run."""
    lines = [f"{what:46} {size / 1e9:8.2f} GB" for what, size in run.memory.items()]
    if run.start_peak:
        lines.append(f"{'measured peak of the closed-form start':46} {run.start_peak / 1e9:8.2f} GB")
    lines.append(f"{'measured peak, activations included':46} {run.peak / 1e9:8.2f} GB")
    if run.disk:
        folder = settings.cache_dir or settings.out
        lines.append(f"{'on disk: logits of the full model':46} {run.disk / 1e9:8.2f} GB in {folder}")
    searches = settings.paths == "searched" and settings.start_from is None
    parts = ["the closed-form start"] * settings.regresses + ["the search for paths"] * searches
    before = f", after {' and '.join(parts)}" if parts else ""
    lines.append(
        f"{run.tokens_per_second:.0f} tokens/s on random paths: {settings.tokens:,} tokens take "
        f"{run.seconds / 3600:.1f} hours{before}"
    )
    return lines


def _progress(row: dict[str, Any]) -> None:
    done, steps = row["step"] + 1, row["steps"]
    if done % SHOWN_EVERY == 0 or done == steps:
        note(
            f"step {done}/{steps}  loss {row['loss']:.4f}  budget {row['budget']:.2f}  "
            f"{row['tokens_per_second']:.0f} tokens/s"
        )
