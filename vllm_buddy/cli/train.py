"""`vllm-buddy train`: runs stage 1 of training, from text to an artifact."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_buddy.errors import TrainingError

if TYPE_CHECKING:
    from pydantic import BaseModel

SHOWN_EVERY = 10  # steps between two lines of progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a configuration file, and settings that override it."""
    add_config_arguments(parser)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, KEY=VALUE and --list."""
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="YAML file of settings")
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="settings that override the file; `--list` shows all of them"
    )
    parser.add_argument("--list", action="store_true", help="list all settings with their defaults and stop")


def run(args: argparse.Namespace) -> int:
    """Train, or continue a run that was stopped, and write the artifact; returns 0.

    Raises:
        BuddyError: a setting, the data or the model cannot be used, the loss is not finite, or the disk is full.
    """
    from vllm_buddy.training.stage1_settings import Stage1Settings

    if args.list:
        return list_settings(Stage1Settings)
    if args.config is None:
        raise TrainingError("no CONFIG is given; name a YAML file of settings, whose keys --list shows")
    settings = Stage1Settings.read(args.config, overrides(args.settings))
    from vllm_buddy.artifact.provenance import source_commit
    from vllm_buddy.models.embedded import fetch
    from vllm_buddy.training.stage1 import run_stage1
    from vllm_buddy.training.stage1_record import finish_run

    commit = source_commit()
    artifact, stage = run_stage1(settings, settings.model or fetch(), _progress, note)
    if stage.accelerator.is_main_process:
        command = " ".join(["vllm-buddy", "train", str(args.config), *args.settings])
        try:
            finish_run(artifact, stage, settings, command, commit)
        except OSError as error:
            raise TrainingError(
                f"cannot write to {settings.out}: {error}; the checkpoint is intact, so run the same command again"
            ) from None
        print(f"wrote artifact '{artifact.config.name}' to {settings.out}")
    return 0


def list_settings(settings: type["BaseModel"]) -> int:
    """Print every setting with its default; returns 0."""
    for name, field in settings.model_fields.items():
        default = "required" if field.is_required() else json.dumps(field.default, default=str)
        print(f"{name:22} {default:12} {field.description or ''}")
    return 0


def overrides(words: list[str]) -> dict[str, str]:
    """Return KEY=VALUE words as a dictionary.

    Raises:
        TrainingError: a word has no "=".
    """
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise TrainingError(f"'{word}' is not KEY=VALUE")
        pairs[key] = value
    return pairs


def note(line: str) -> None:
    """Print a line about the progress to standard error."""
    print(line, file=sys.stderr, flush=True)


def _progress(row: dict[str, Any]) -> None:
    done, steps = row["step"] + 1, row["steps"]
    if done % SHOWN_EVERY == 0 or done == steps:
        note(
            f"step {done}/{steps}  loss {row['loss']:.4f}  budget {row['budget']:.2f}  "
            f"{row['tokens_per_second']:.0f} tokens/s"
        )
