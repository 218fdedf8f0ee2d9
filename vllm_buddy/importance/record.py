"""What lies beside an artifact's tensors: the model card and the record of the run."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path as FilePath
from typing import Any

import vllm_buddy
from vllm_buddy.importance.base import INDICATORS
from vllm_buddy.importance.build import PriorResult
from vllm_buddy.importance.settings import PriorSettings
from vllm_buddy.method import depth_for_budget

CARD_FILE = "README.md"
RUN_FILE = "run.yaml"


def model_card(result: PriorResult, settings: PriorSettings) -> str:
    """README.md of the artifact."""
    config = result.artifact.config
    base = config.base_model
    chosen = config.prior.indicator
    order = (int(i) + 1 for i in result.artifact.prior.argsort(kind="stable"))
    library = f", and a path library of up to {settings.library} paths per depth" if config.library else ""
    lines = [
        "---",
        "library_name: vllm-buddy",
        f"base_model: {json.dumps(base.id)}",
        "tags: [vllm, dynamic-depth, layer-skipping]",
        "---",
        f"# {config.name}",
        "",
        f"A routing prior for {base.id} ({base.architecture}, {base.num_layers} layers, fingerprint "
        f"`{base.fingerprint}`), for serving with vllm_buddy.",
        "",
        "**Nothing here is trained.** There is no Decision Module: every request of one budget runs the same layers, "
        "the most important ones by a static measure. Expect the text to suffer as soon as layers are left out. The "
        "artifact holds the prior" + library + "; the base model's weights are not in it.",
        "",
        f"Indicator: `{chosen}` ({INDICATORS[chosen].title}), measured on the first {config.prior.num_tokens:,} tokens "
        f"of {config.prior.calibration} in windows of {settings.window}. First and last layer always run. The others "
        "leave in this order:",
        "",
        f"    {' '.join(map(str, order))}",
        "",
        *_perplexity_section(result, settings),
        "## How it was made",
        "",
        f"    {settings.command()}",
        "",
        f"`{RUN_FILE}` has every setting and version.",
    ]
    return "\n".join(lines) + "\n"


def run_record(result: PriorResult, settings: PriorSettings, commit: str | None) -> str:
    """run.yaml: every setting, the data, versions and date. Each value is written as JSON, which YAML contains.

    commit: see source_commit.
    """
    record: dict[str, Any] = {
        "command": settings.command(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit,
        "seed": None,  # nothing is drawn at random
        "settings": json.loads(settings.model_dump_json()),
        "text": {"name": result.text.name, "sha256": result.text.sha256},
        "base_model": result.artifact.config.base_model.model_dump(),
        "perplexity": {
            name: {f"{budget:g}": round(value, 4) for budget, value in row.items()}
            for name, row in result.perplexity.items()
        },
        "versions": {
            "vllm_buddy": vllm_buddy.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "transformers", "numpy", "safetensors")},
        },
    }
    return _yaml(record)


def _perplexity_section(result: PriorResult, settings: PriorSettings) -> list[str]:
    if not result.perplexity:
        return []
    num_layers = result.artifact.config.base_model.num_layers
    budgets = list(next(iter(result.perplexity.values())))
    chosen = result.artifact.config.prior.indicator
    rows = [
        [f"`{name}`" + (" (this artifact)" if name == chosen else ""), *(f"{row[b]:,.1f}" for b in budgets)]
        for name, row in result.perplexity.items()
    ]
    header = ["indicator", *(f"budget {b:g} ({depth_for_budget(b, num_layers)} layers)" for b in budgets)]
    return [
        "## Perplexity",
        "",
        f"On the {settings.heldout:,} tokens of {result.text.name} that follow the calibration part, in windows of "
        f"{settings.window} tokens scored each by itself, KV policy `masked`, float32. Lower is better.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)),
        "",
    ]


def _yaml(record: dict[str, Any], indent: str = "") -> str:
    text = ""
    for key, value in record.items():
        key = json.dumps(key) if not key.isidentifier() else key
        if isinstance(value, dict) and value:
            text += f"{indent}{key}:\n{_yaml(value, indent + '  ')}"
        else:
            text += f"{indent}{key}: {json.dumps(value)}\n"
    return text


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def source_commit() -> str | None:
    """The last commit that touched this package, "with changes" if files differ from it; None if not a checkout.

    To be asked before a measurement starts: it is the code that ran, not what lies there when it ends.
    """
    commit = _git("log", "-1", "--format=%H", "--", ".")
    return f"{commit} with changes" if commit and _git("status", "--porcelain", "--", ".") else commit


def _git(*arguments: str) -> str | None:
    folder = FilePath(vllm_buddy.__file__).parent
    try:
        found = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
