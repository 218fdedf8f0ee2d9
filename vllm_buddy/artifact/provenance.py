"""Records how an artifact was made: command, date, commit and versions, for run.yaml and for the model card."""

import json
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import vllm_buddy
from vllm_buddy.installed import installed_version

CARD_FILE = "README.md"
RUN_FILE = "run.yaml"
PREDICTOR_KEY = "budget_predictor"  # in RUN_FILE, of the part that stage 2 adds
DRAFTS_HEADING = "## Draft exits"  # of the card's section that `vllm-buddy train-drafts` replaces


def command_line(command: str, settings: BaseModel, positional: Sequence[str]) -> str:
    """Return the command line `vllm-buddy COMMAND` that has these settings; settings with default values are omitted.

    positional: names of the settings that are positional arguments, in order.
    """
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
    """Return the first entries of run.yaml.

    commit: result of source_commit. seed: None if nothing is random.
    """
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit,
        "seed": seed,
        "versions": {
            "vllm_buddy": vllm_buddy.__version__,
            "python": platform.python_version(),
            **{name: installed_version(name) for name in ("torch", "transformers", "numpy", "safetensors")},
        },
    }


def card_title(name: str, base_model_id: str) -> list[str]:
    """Return the first lines of a model card, with the metadata that the Hugging Face hub reads."""
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
    """Return the last lines of a model card: the command that made the artifact. recorded: what RUN_FILE contains."""
    return ["## How it was made", "", f"    {command}", "", f"`{RUN_FILE}` has {recorded}."]


def to_yaml(record: dict[str, Any], indent: str = "") -> str:
    """Return nested dictionaries as YAML. Each value is written as JSON, which is valid YAML."""
    text = ""
    for key, value in record.items():
        key = json.dumps(key) if not key.isidentifier() else key
        if isinstance(value, dict) and value:
            text += f"{indent}{key}:\n{to_yaml(value, indent + '  ')}"
        else:
            text += f"{indent}{key}: {json.dumps(value)}\n"
    return text


def add_section(
    source: Path, out: Path, names: tuple[str, str], section: str, key: str, record: dict[str, Any]
) -> None:
    """Write the card and the record of the artifact in `source` to `out`, with what a further command has to add.

    names: of the artifact and of its base model, for a card where there is none. section: of the card, from its heading
    on. record: under `key` in run.yaml. Both replace those of the same heading and key.

    Raises:
        OSError: a file cannot be read or written.
    """
    card, run = (path.read_text() if (path := source / name).is_file() else "" for name in (CARD_FILE, RUN_FILE))
    (out / CARD_FILE).write_text(with_section(card or "\n".join(card_title(*names)), section))
    (out / RUN_FILE).write_text(without_key(run, key) + to_yaml({key: record}))


def trained_share(folder: Path, sha256: str, part: str | None = None) -> float:
    """Return how much of a file, from its beginning, the artifact in `folder` was trained on; 0: none is recorded.

    What an artifact before it (`start_from`) was trained on is not in its record. sha256: hash of the file's bytes.
    part: key of a part that was added (PREDICTOR_KEY), instead of stage 1.
    """
    import yaml

    try:
        record = yaml.safe_load((folder / RUN_FILE).read_text())
        found = (record if part is None else record[part])["data"].values()
        shares = [float(source.get("share", 1)) for source in found if source["sha256"] == sha256]
        return max((share for share in shares if 0 < share <= 1), default=0.0)
    # Not in the form that training writes: the file may come from anyone.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return 0.0


def with_section(card: str, section: str) -> str:
    """Return `card` with `section` in place of the one with its heading, or before the last heading of that level."""
    if old := section_of(card, section.splitlines()[0]):
        return card.replace(old, section, 1)
    last = card.rfind("\n## ")
    return card[: last + 1] + section + card[last + 1 :] if last >= 0 else f"{card}\n{section}"


def section_of(card: str, heading: str) -> str:
    """Return the section of `card` with this heading; empty where there is none."""
    start = card.find(f"{heading}\n")
    end = card.find("\n## ", start)
    return "" if start < 0 else card[start : end + 1 if end >= 0 else len(card)]


def without_key(yaml: str, key: str) -> str:
    """Return a record, in the form that `to_yaml` writes, without one of its top-level keys."""
    kept, inside = [], False
    for line in yaml.splitlines(keepends=True):
        if not line.startswith(" "):
            inside = line.startswith(f"{key}:")
        if not inside:
            kept.append(line)
    return "".join(kept)


def source_commit() -> str | None:
    """Return the last commit that touched this package, plus "with changes" if files differ; None outside a checkout.

    Call this before a measurement starts, so that the record names the code that ran even if files change meanwhile.
    """
    commit = _git("log", "-1", "--format=%H", "--", ".")
    return f"{commit} with changes" if commit and _git("status", "--porcelain", "--", ".") else commit


def _git(*arguments: str) -> str | None:
    folder = Path(vllm_buddy.__file__).parent
    try:
        found = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
