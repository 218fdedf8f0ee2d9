"""Reads the settings of a training command from a YAML file and KEY=VALUE overrides."""

from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from vllm_buddy.errors import TrainingError

Settings = TypeVar("Settings", bound=BaseModel)


def _value(settings: type[BaseModel], key: str, text: str) -> Any:
    field = settings.model_fields.get(key)
    types = set() if field is None else set(_plain_types(field.annotation))
    if not types or types - {str, Path, NoneType}:
        return yaml.safe_load(text)
    return None if not text or (text == "null" and NoneType in types) else text


def _plain_types(annotation: Any) -> Iterator[Any]:
    """The types that a value may have: members of a union, without what is said about them, and types of literals."""
    if get_origin(annotation) is Annotated:
        yield from _plain_types(get_args(annotation)[0])
    elif get_origin(annotation) is Literal:
        yield from map(type, get_args(annotation))
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _plain_types(member)
    else:
        yield annotation


def read_settings_file(settings: type[Settings], config: Path | None, overrides: dict[str, str]) -> Settings:
    """Read settings from a YAML file, if there is one, then from overrides.

    Those of words and paths are taken as they are, but for `null` where a setting may be absent. Others are YAML.

    Raises:
        TrainingError: the file cannot be read, a key is unknown or a value is not allowed.
    """
    try:
        loaded = {} if config is None else yaml.safe_load(config.read_text())
        overridden = {key: _value(settings, key, text) for key, text in overrides.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read {config}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date or number that cannot be, too deep nesting
        raise TrainingError(f"{config} or an override is not YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise TrainingError(f"{config} must hold `key: value` lines")
    values: dict[Any, Any] = loaded | overridden
    unknown = sorted(str(key) for key in set(values) - set(settings.model_fields))
    if unknown:
        raise TrainingError(f"unknown settings {', '.join(unknown)}; known are {', '.join(settings.model_fields)}")
    try:
        return settings(**values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        is_no_list = any(e["loc"] == ("data",) for e in error.errors())
        hint = ". `data` is a list of sources, such as data=[{file: text.txt}]" if is_no_list else ""
        raise TrainingError(f"not a valid setting: {problems}{hint}") from None
