"""Runs of stage 1 that stop, and what a run finds in its folder when it starts."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.harness.tiny_models import load_model, random_exits, random_predictor
from tests.training.conftest import run
from tests.training.recipes import RECIPES
from vllm_buddy.artifact import RUN_FILE, Artifact, identify, load_artifact, with_drafts
from vllm_buddy.artifact.config import PredictorConfig
from vllm_buddy.baselines import LayerOrder, OrderFile
from vllm_buddy.errors import TrainingError
from vllm_buddy.method import DraftExit, ExitAdapter
from vllm_buddy.method.decision import value_table
from vllm_buddy.training import checkpoint, start
from vllm_buddy.training.loop import LOG_FILE
from vllm_buddy.training.stage1_record import finish_run
from vllm_buddy.training.stage1_settings import Stage1Settings


@pytest.mark.parametrize("name", ["bypass", "bypass by muon", "paper"])
@pytest.mark.parametrize(("stop_after", "saved"), [(3, 2), (6, 4)])
def test_a_stopped_run_goes_on_with_the_same_losses(
    settings: dict[str, Any], name: str, stop_after: int, saved: int, tmp_path: Path
) -> None:
    """Fails if a resumed run draws other data, loses the optimizer's state or logs a step twice."""
    whole, _, losses = run(settings | RECIPES[name] | {"out": tmp_path / "whole", "name": "run"})
    with pytest.raises(KeyboardInterrupt):
        run(settings | RECIPES[name], stop_after)
    with (settings["out"] / LOG_FILE).open("a") as log:
        log.write('{"step": 4, "lo')  # what a full disk leaves
    resumed, _, rest = run(settings | RECIPES[name])
    assert rest == losses[saved:]
    assert resumed.digest == whole.digest
    rows = [json.loads(line) for line in (settings["out"] / LOG_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    assert [row["loss"] for row in rows] == losses


def test_a_stopped_run_may_be_shortened(settings: dict[str, Any]) -> None:
    """Fails if a run that takes too long must be thrown away, or its record hides that it was to be longer."""
    with pytest.raises(KeyboardInterrupt):
        run(settings, 3)
    shorter = settings | {"tokens": settings["tokens"] * 5 // 6}
    artifact, stage, rest = run(shorter)
    assert len(rest) == 3  # steps 2 to 4
    finish_run(artifact, stage, Stage1Settings(**shorter), "vllm-buddy train", None)
    record = yaml.safe_load((settings["out"] / RUN_FILE).read_text())
    assert record["lengths"] == [
        {"from_step": 0, "tokens": settings["tokens"]},
        {"from_step": 2, "tokens": shorter["tokens"]},
    ]


def test_the_card_counts_what_was_trained(settings: dict[str, Any]) -> None:
    """Fails if a run that was shortened after more steps than it has now is said to have seen less text."""
    explored = settings | {"explore_tokens": 2 * 4 * 32 + 5}
    run(explored)
    shorter = explored | {"tokens": 4 * 4 * 32}
    artifact, stage, rest = run(shorter)
    assert rest == []
    finish_run(artifact, stage, Stage1Settings(**shorter), "vllm-buddy train", None)
    assert f"Trained on {6 * 4 * 32} tokens of" in (settings["out"] / "README.md").read_text()
    assert yaml.safe_load((settings["out"] / RUN_FILE).read_text())["trained_tokens"] == 6 * 4 * 32


def test_a_stopped_run_may_be_named_and_moved(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if settings that change no loss keep a run from going on, or are not those that are written."""
    with pytest.raises(KeyboardInterrupt):
        run(settings, 3)
    moved = tmp_path / "moved"
    shutil.copytree(settings["model"], moved)
    changed = settings | {"model": moved, "base_model_id": "me/mine", "decide_every": 8}
    artifact, stage, rest = run(changed)
    assert len(rest) == 4
    assert (artifact.config.base_model.id, artifact.config.route_every) == ("me/mine", 8)
    finish_run(artifact, stage, Stage1Settings(**changed), "vllm-buddy train", None)
    written = yaml.safe_load((settings["out"] / RUN_FILE).read_text())
    assert (written["settings"]["decide_every"], written["base_model"]["id"]) == (8, "me/mine")
    artifact.save(tmp_path / "start")
    more = settings | {"start_from": str(tmp_path / "start"), "out": tmp_path / "more", "base_model_id": "you/yours"}
    assert run(more)[0].config.base_model.id == "you/yours"


def test_a_folder_with_another_run_is_refused(settings: dict[str, Any]) -> None:
    """Fails if a run is resumed with other settings."""
    run(settings)
    with pytest.raises(TrainingError, match="other settings"):
        run(settings | {"learning_rate": 0.5})


def test_a_run_is_not_resumed_on_other_weights_or_another_order(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if a run goes on with the model, the artifact or the orders that were put in the place of its own."""
    model = tmp_path / "model"
    shutil.copytree(settings["model"], model)
    run(settings | {"model": model})
    tuned: Any = load_model(model)
    with torch.no_grad():
        tuned.model.layers[3].mlp.down_proj.weight.mul_(1.5)
    tuned.save_pretrained(model)
    with pytest.raises(TrainingError, match="other settings, data or weights"):
        run(settings | {"model": model})

    first, second = run(settings | {"out": tmp_path / "a"})[0], run(settings | {"out": tmp_path / "b", "seed": 1})[0]
    more = settings | {"start_from": str(tmp_path / "start"), "out": tmp_path / "more"}
    first.save(tmp_path / "start")
    run(more)
    second.save(tmp_path / "start")
    with pytest.raises(TrainingError, match="other settings, data or weights"):
        run(more)

    orders = tmp_path / "orders.json"
    static = settings | {"paths": "shortgpt", "orders": orders, "out": tmp_path / "static"}
    for layers in ([3, 5, 1, 2, 4, 6], [5, 3, 1, 2, 4, 6]):
        order = LayerOrder(
            method="shortgpt", calibration="x", calibration_sha256="0", num_tokens=1, window=1, layers=layers
        )
        OrderFile(base_model=identify(settings["model"]), orders=[order]).save(orders)
        if layers[0] == 3:
            run(static)
    with pytest.raises(TrainingError, match="other settings, data or weights"):
        run(static)


def test_a_full_disk_leaves_the_last_checkpoint(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a full disk destroys the last checkpoint."""
    saved = torch.save

    def full(state: dict[str, Any], file: Any) -> None:
        if state.get("step", 0) > 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        saved(state, file)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(TrainingError, match=r"No space left on device.*is intact"):
        run(settings)
    monkeypatch.undo()
    assert checkpoint.load_state(settings["out"] / checkpoint.CHECKPOINT_FILE)["step"] == 2
    assert not list(settings["out"].glob("*.partial"))
    _, _, rest = run(settings)
    assert len(rest) == 4


def test_a_loss_that_is_not_finite_stops_and_names_the_step(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if weights that are NaN replace the last good checkpoint."""
    from vllm_buddy.training import loop

    calls, loss = [], loop.distillation_loss

    def broken(*args: Any) -> torch.Tensor:
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) > 4 * 3 else 1.0)

    monkeypatch.setattr(loop, "distillation_loss", broken)
    with pytest.raises(TrainingError, match="step 3: the loss is nan"):
        run(settings)
    state = checkpoint.load_state(settings["out"] / checkpoint.CHECKPOINT_FILE)
    assert state["step"] == 2
    assert all(p.isfinite().all() for p in state["parameters"])


def test_a_run_does_not_replace_what_it_has_not_made(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if `train` overwrites the artifact it starts from, another one, or what was added to its own."""
    first = tmp_path / "first"
    artifact, stage, _ = run(settings | {"out": first})
    finish_run(artifact, stage, Stage1Settings(**settings | {"out": first}), "vllm-buddy train", None)
    with pytest.raises(TrainingError, match="start_from and out are both"):
        run(settings | {"out": first, "start_from": str(first)}, 1)
    shutil.copytree(first, tmp_path / "other", ignore=shutil.ignore_patterns("*.pt"))
    with pytest.raises(TrainingError, match="an artifact of another origin"):
        run(settings | {"out": tmp_path / "other"}, 1)
    run(settings | {"out": first})  # going on with what is done
    exits = DraftExit(0b1000_0101, ExitAdapter(torch.zeros(2, 128), torch.zeros(128, 2), 1e-6))
    with_drafts(load_artifact(first), (exits,), None).save(first)
    with pytest.raises(TrainingError, match="has got draft exits since it was trained"):
        run(settings | {"out": first}, 1)


@pytest.mark.parametrize("part", ["a Budget Predictor", "draft exits"])
def test_a_run_from_an_artifact_drops_nothing_that_was_added_to_its_own(
    settings: dict[str, Any], tmp_path: Path, part: str
) -> None:
    """Fails if a run with `start_from` that is run again deletes what its artifact has got since."""
    source = tmp_path / "first"
    artifact, stage, _ = run(settings | {"out": source})
    finish_run(artifact, stage, Stage1Settings(**settings | {"out": source}), "vllm-buddy train", None)
    _with_part(artifact, part, settings["model"], seed=0).save(source)  # which the run keeps
    more = settings | {"start_from": str(source)}
    artifact, stage, _ = run(more)
    finish_run(artifact, stage, Stage1Settings(**more), "vllm-buddy train", None)
    run(more)  # with the parts of the artifact that it starts from
    _with_part(load_artifact(settings["out"]), part, settings["model"], seed=1).save(settings["out"])
    with pytest.raises(TrainingError, match=f"has got {part} since it was trained"):
        run(more, 1)


def _with_part(artifact: Artifact, part: str, model_dir: Path, seed: int) -> Artifact:
    model = load_model(model_dir)
    if part == "draft exits":
        return with_drafts(artifact, random_exits(model, (4,), seed=seed, gaps=True))
    predictor = random_predictor(value_table(model), (4, 6, 8), 8, seed=seed)
    found = PredictorConfig(depths=predictor.depths, price=1.0)
    config = artifact.config.model_copy(update={"predictor": found})
    return dataclasses.replace(artifact, config=config, predictor=predictor)


@pytest.mark.parametrize("name", ["README.md", "run.yaml", "log.jsonl", "notes.txt"])
def test_files_of_the_user_are_no_run(settings: dict[str, Any], name: str) -> None:
    """Fails if `train` overwrites a user's own files, or begins among them."""
    settings["out"].mkdir()
    (settings["out"] / name).write_text('{"mine": true}\n')
    with pytest.raises(TrainingError, match=rf"holds {name}, which no run has made"):
        run(settings, 1)
    assert [path.name for path in settings["out"].iterdir()] == [name]
    (settings["out"] / name).unlink()
    with pytest.raises(KeyboardInterrupt):
        run(settings, 1)
    (settings["out"] / "notes.txt").write_text("of a run that has begun")
    (settings["out"] / "README.md").write_text("mine")
    with pytest.raises(TrainingError, match=r"holds README\.md, which no run has made"):
        run(settings, 1)


def test_a_run_that_has_nothing_but_a_log_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if a run that was stopped before its first checkpoint does not know its own folder."""
    run(settings | {"out": tmp_path / "first"})[0].save(tmp_path / "start")
    more = settings | {"start_from": str(tmp_path / "start"), "cache_dir": tmp_path / "cache"}
    with pytest.raises(KeyboardInterrupt):
        run(more, 1)
    assert [path.name for path in settings["out"].iterdir()] == [LOG_FILE]
    run(more)


def test_the_regression_is_not_made_twice(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run that is killed while it explores begins again with the closed-form start."""
    exploring = settings | RECIPES["bypass explored first"]
    with pytest.raises(KeyboardInterrupt):
        run(exploring, 1)
    monkeypatch.setattr(start, "fit_bypass", None)
    run(exploring)
