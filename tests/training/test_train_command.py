"""The command `vllm-buddy train` without a settings file."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_buddy.artifact import RUN_FILE, load_artifact
from vllm_buddy.cli import main
from vllm_buddy.training.stage1_settings import Stage1Settings


def test_settings_without_a_file(settings: dict[str, Any], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a run needs a file though all its settings are given, or its record cannot be pasted into a shell."""
    assert main(["train"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err
    assert main(["train", "tokens=1000"]) == 2
    assert "data: Field required" in capsys.readouterr().err
    words = [f"{key}={value}" for key, value in settings.items() if key != "data"]
    assert main(["train", *words, f"data=[{{file: {data}}}]"]) == 0
    assert load_artifact(settings["out"]).bypass is not None
    command = yaml.safe_load((settings["out"] / RUN_FILE).read_text())["command"]
    assert shlex.split(command) == ["vllm-buddy", "train", *words, f"data=[{{file: {data}}}]"]


def test_list_shows_the_settings_without_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the list of settings needs a configuration file."""
    assert main(["train", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in Stage1Settings.model_fields)
    assert main(["train"]) == 2
