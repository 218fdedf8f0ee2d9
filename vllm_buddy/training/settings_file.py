"""Reads the settings of a training command from a YAML file and KEY=VALUE overrides."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vllm_buddy.errors import TrainingError

Settings = TypeVar("Settings", bound=BaseModel)


def read_settings_file(settings: type[Settings], config: Path | None, overrides: dict[str, str]) -> Settings:
    """Read settings from a YAML file, if there is one, then from overrides, whose values are YAML too.

    Raises:
        TrainingError: the file cannot be read, a key is unknown or a value is not allowed.
    """
    try:
        loaded = {} if config is None else yaml.safe_load(config.read_text())
        overridden = {key: yaml.safe_load(text) for key, text in overrides.items()}
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
