"""Generates command line options from a schema of settings, and reads the settings from parsed options."""

import argparse
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vllm_buddy.errors import BuddyError, own_error

Settings = TypeVar("Settings", bound=BaseModel)


def add_setting_options(
    parser: argparse.ArgumentParser, settings: type[BaseModel], positional: Sequence[str] = ()
) -> None:
    """Add one option for each field of `settings`, with description and default; `positional` ones have no dashes."""
    for name, field in settings.model_fields.items():
        help_text = field.description or ""
        has_default = field.default is not None and not isinstance(field.default, bool) and field.default != ()
        if has_default and not field.is_required():
            help_text += f" (default: {_shown(field.default)})"
        if name in positional:
            parser.add_argument(name, metavar=name.upper(), help=help_text)
        elif field.annotation is bool:
            parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=help_text)
        else:
            value_type = int if int in _members(field.annotation) else str
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                type=value_type,
                required=field.is_required(),
                default=None if field.is_required() else field.default,
                metavar="N" if value_type is int else name.upper().replace("_", "-"),
                help=help_text,
            )


def read_settings(settings: type[Settings], args: argparse.Namespace, error_type: type[BuddyError]) -> Settings:
    """Return the settings in `args`.

    Raises:
        BuddyError: a value is not allowed; of `error_type`, or the schema's own error.
    """
    try:
        return settings(**{name: getattr(args, name) for name in settings.model_fields})
    except ValidationError as error:
        if (own := own_error(error)) is not None:
            raise own from None
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise error_type(f"not a valid setting: {problems}") from None


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the types in a union, or the one type."""
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
