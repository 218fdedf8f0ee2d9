"""CONFIG, KEY=VALUE and --list: how training commands take their settings."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_buddy.errors import TrainingError

if TYPE_CHECKING:
    from pydantic import BaseModel


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, KEY=VALUE and --list."""
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file of settings; may be left out")
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="settings that override the file; `--list` shows all of them"
    )
    parser.add_argument("--list", action="store_true", help="list all settings with their defaults and stop")


def take_words(args: argparse.Namespace, rest: Sequence[str]) -> bool:
    """Add what argparse has left over to the settings: some versions of it do not take KEY=VALUE after an option.

    Returns:
        Whether the command takes such words, and these are some.
    """
    if not hasattr(args, "settings") or any(word.startswith("-") for word in rest):
        return False
    args.settings = [*args.settings, *rest]
    return True


def list_settings(settings: type["BaseModel"]) -> int:
    """Print every setting with its default; returns 0."""
    for name, field in settings.model_fields.items():
        default = "required" if field.is_required() else json.dumps(field.default, default=str)
        print(f"{name:22} {default:12} {field.description or ''}")
    return 0


def given_words(args: argparse.Namespace) -> list[str]:
    """Return CONFIG, if there is one, and the KEY=VALUE words, as they were given."""
    return [*([] if args.config is None else [args.config]), *args.settings]


def config_and_overrides(args: argparse.Namespace) -> tuple[Path | None, dict[str, str]]:
    """Return the configuration file, if one is named, and the KEY=VALUE words as a dictionary.

    Raises:
        TrainingError: neither is given, or a word has no "=".
    """
    words = given_words(args)
    if not words:
        raise TrainingError("name a YAML file of settings, or give settings as KEY=VALUE; --list shows all of them")
    first = Path(words[0])
    config = first if first.is_file() or "=" not in words[0] else None
    pairs = {}
    for word in words if config is None else words[1:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise TrainingError(f"'{word}' is not KEY=VALUE")
        pairs[key] = value
    return config, pairs
