"""The command `vllm-buddy train` without a settings file."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_buddy.artifact import CARD_FILE, RUN_FILE, load_artifact
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


def test_the_command_on_the_card_scores_the_artifact(settings: dict[str, Any], data: Path) -> None:
    """Fails if what a model card says measures the artifact works for the embedded model alone."""
    words = [f"{key}={value}" for key, value in settings.items() if key != "data"]
    assert main(["train", *words, f"data=[{{file: {data}}}]"]) == 0
    card = (settings["out"] / CARD_FILE).read_text()
    (command,) = re.findall(r"`vllm-buddy (eval .*) --piqa FILE` measures", card)
    given = {"MODEL": str(settings["model"]), "DIR": str(settings["out"]), "FILE": str(data)}
    sizes = ["--window", "64", "--context", "16", "--text-tokens", "256"]
    assert main([*(given.get(word, word) for word in shlex.split(command)), *sizes]) == 0


@pytest.mark.parametrize("words", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("package", ["accelerate", "matplotlib"])
def test_a_missing_package_is_told_at_once(
    settings: dict[str, Any],
    data: Path,
    package: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if a package that is missing ends in a traceback, or is found missing when all is trained."""
    monkeypatch.setitem(sys.modules, package, None)
    given = [f"{key}={value}" for key, value in settings.items() if key != "data"]
    assert main(["train", *given, f"data=[{{file: {data}}}]", *words]) == 2
    assert f"pip install {package}" in capsys.readouterr().err
    assert not settings["out"].exists()


@pytest.mark.parametrize("at", [0, 1, 2])
def test_options_may_stand_among_the_settings(at: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if KEY=VALUE after an option is not taken, or a word that no command knows is."""
    config = tmp_path / "run.yaml"
    config.write_text("data: [{file: none.txt}]\nmodel: none\n")
    words = [str(config), f"out={tmp_path / 'out'}", "rank=3"]
    words.insert(at, "--dry-run")
    assert main(["train", *words]) == 2
    assert "rank must be even, not 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", *words, "--dry-rum"])
    assert "unrecognized arguments" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["artifacts", "out=here"])
    assert "unrecognized arguments: out=here" in capsys.readouterr().err


def test_list_shows_the_settings_without_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the list of settings needs a configuration file."""
    assert main(["train", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in Stage1Settings.model_fields)
    assert main(["train"]) == 2
