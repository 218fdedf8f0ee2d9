"""What `vllm-buddy train --dry-run` measures and tells."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.harness.tiny_models import NUM_LAYERS, load_model
from tests.training.conftest import run
from vllm_buddy.cli import main
from vllm_buddy.training.dry_run import dry_run
from vllm_buddy.training.stage1_settings import Stage1Settings


def test_a_dry_run_measures(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if the numbers of a dry run are not those of this model and these settings."""
    checked = Stage1Settings(**settings)
    found = dry_run(checked, settings["model"])
    weights, repair, moments = found.memory.values()
    parameters = sum(p.numel() for p in load_model(settings["model"]).parameters())
    hidden, middle = 128, NUM_LAYERS - 2
    assert weights == 4 * parameters
    assert repair == 4 * 4 * middle * 2 * hidden * checked.rank
    assert moments == 3 * 4 * middle * hidden**2
    assert found.disk == 6 * 4 * 32 * checked.top_logits * 6  # sequences, their tokens, and bytes of a logit
    assert found.peak > weights
    assert found.start_peak > weights
    assert found.seconds == pytest.approx(checked.tokens / found.tokens_per_second)


def test_a_dry_run_needs_no_room_for_the_whole_run(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a small temporary folder keeps a user from measuring what a large run takes."""
    room = 3 * 4 * 32 * settings["top_logits"] * 6  # of the steps that it measures
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    assert dry_run(Stage1Settings(**settings), settings["model"]).disk == 2 * room


def test_a_dry_run_of_a_short_run_measures_the_usual_steps(settings: dict[str, Any]) -> None:
    """Fails if the dry run of a run of fewer steps than it measures runs out of sequences."""
    found = dry_run(Stage1Settings(**settings | {"tokens": 4 * 32}), settings["model"])
    assert found.disk == 4 * 32 * settings["top_logits"] * 6  # of the one step that the run has
    assert found.seconds == pytest.approx(4 * 32 / found.tokens_per_second)


def test_a_dry_run_checks_and_measures_the_run_that_was_asked_for(
    settings: dict[str, Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a run that starts from an artifact is told what it does not do, or its mistakes are not found."""
    run(settings | {"out": tmp_path / "first"})[0].save(tmp_path / "start")
    words = [f"{key}={value}" for key, value in settings.items() if key != "data"]
    command = ["train", *words, f"data=[{{file: {data}}}]", "--dry-run"]
    command[1:1] = [f"start_from={tmp_path / 'start'}"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "closed-form" not in said
    assert "search" not in said
    for change, message in (
        ("start_from=/nowhere", "no artifact at /nowhere"),
        ("rank=8", "has rank 4; set rank to that"),
        (f"length=4096 tokens={1 << 20}", "beyond the model's"),
        (f"out={tmp_path}", "which no run has made"),
    ):
        changed = dict(word.split("=", 1) for word in [*command[1:-1], *change.split()])
        assert main(["train", *(f"{key}={value}" for key, value in changed.items()), "--dry-run"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["bypass", "distill"])
def test_a_dry_run_tells_and_writes_nothing(
    settings: dict[str, Any], data: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a dry run leaves files, or does not say memory, disk and time."""
    paths = "searched" if recipe == "bypass" else "random"
    words = [f"{key}={value}" for key, value in settings.items() if key != "data"]
    assert main(["train", *words, f"data=[{{file: {data}}}]", f"recipe={recipe}", f"paths={paths}", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "base weights (float32)" in said
    assert said.count("closed-form start") == (3 if recipe == "bypass" else 0)
    assert "tokens/s on random paths: 768 tokens take 0.0 hours" in said
    assert not settings["out"].exists()
