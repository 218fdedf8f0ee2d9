"""What every record of a run holds: command, date, commit and versions; and how it is written."""

import json
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import vllm_buddy

CARD_FILE = "README.md"
RUN_FILE = "run.yaml"


def command_line(command: str, settings: BaseModel, positional: Sequence[str]) -> str:
    """The command line of `vllm-buddy COMMAND` with these settings; those left at their defaults are left out."""
    words = ["vllm-buddy", command, *(str(getattr(settings, name)) for name in positional)]
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if name in positional or value == field.default:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return shlex.join(words)


def run_header(command: str, commit: str | None, seed: int | None) -> dict[str, Any]:
    """The first lines of run.yaml. commit: see source_commit. seed: None where nothing is drawn at random."""
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit,
        "seed": seed,
        "versions": {
            "vllm_buddy": vllm_buddy.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "transformers", "numpy", "safetensors")},
        },
    }


def card_title(name: str, base_model_id: str) -> list[str]:
    """The first lines of a model card, as the Hugging Face hub reads them."""
    return [
        "---",
        "library_name: vllm-buddy",
        f"base_model: {json.dumps(base_model_id)}",
        "tags: [vllm, dynamic-depth, layer-skipping]",
        "---",
        f"# {name}",
        "",
    ]


def card_origin(command: str, recorded: str = "every setting and version") -> list[str]:
    """The last lines of a model card: the command that made what lies there. recorded: what RUN_FILE has."""
    return ["## How it was made", "", f"    {command}", "", f"`{RUN_FILE}` has {recorded}."]


def to_yaml(record: dict[str, Any], indent: str = "") -> str:
    """Nested dictionaries as YAML. Each value is written as JSON, which YAML contains."""
    text = ""
    for key, value in record.items():
        key = json.dumps(key) if not key.isidentifier() else key
        if isinstance(value, dict) and value:
            text += f"{indent}{key}:\n{to_yaml(value, indent + '  ')}"
        else:
            text += f"{indent}{key}: {json.dumps(value)}\n"
    return text


def source_commit() -> str | None:
    """The last commit that touched this package, "with changes" if files differ from it; None if not a checkout.

    To be asked before a measurement starts: it is the code that ran, not what lies there when it ends.
    """
    commit = _git("log", "-1", "--format=%H", "--", ".")
    return f"{commit} with changes" if commit and _git("status", "--porcelain", "--", ".") else commit


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    folder = Path(vllm_buddy.__file__).parent
    try:
        found = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
