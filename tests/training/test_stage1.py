"""Stage 1 of training, from settings to an artifact that can be served."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness.tiny_models import NUM_LAYERS, load_model
from tests.training.conftest import run
from tests.training.recipes import RECIPES
from vllm_buddy.artifact import identify, load_artifact
from vllm_buddy.baselines import LayerOrder, OrderFile
from vllm_buddy.errors import BuddyError
from vllm_buddy.method import FoldedDecision, PathSchedule, RequestRoute, batched, layers_of
from vllm_buddy.method.decision import value_table
from vllm_buddy.method.reference import generate, routed_logits
from vllm_buddy.training.loop import LOG_FILE
from vllm_buddy.training.regression import fit_bypass
from vllm_buddy.training.routing import LearnedRouting
from vllm_buddy.training.stage1_record import finish_run
from vllm_buddy.training.stage1_settings import Stage1Settings


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_an_artifact_that_loads_and_routes(settings: dict[str, Any], name: str) -> None:
    """Fails if a recipe trains an artifact that cannot be loaded or routed."""
    artifact, stage, losses = run(settings | RECIPES[name])
    finish_run(artifact, stage, Stage1Settings(**settings | RECIPES[name]), "vllm-buddy train", None)
    loaded = load_artifact(settings["out"])
    assert loaded.digest == artifact.digest
    assert loaded.schedule().interval == RECIPES[name].get("decide_every", PathSchedule().interval)
    assert all(np.isfinite(losses))
    assert len(losses) == RECIPES[name].get("tokens", 6 * 4 * 32) // (4 * 32)
    assert {p.name for p in settings["out"].iterdir()} >= {"README.md", "run.yaml", "curves.png", LOG_FILE}
    recipe = RECIPES[name].get("recipe", "bypass")
    assert (loaded.bypass is not None, loaded.lora is not None) == (recipe == "bypass", recipe != "bypass")
    model = load_model(settings["model"])
    if loaded.lora is not None:
        loaded.lora.merge_into(model)
    route = RequestRoute(loaded.router(), PathSchedule(4), 5, [5, 6, 7])
    done = generate(model, route, [5, 6, 7], 9, "masked", bypass=loaded.bypass)
    assert {len(layers_of(path)) for path in done.paths} == {5}


def test_a_learned_decision_is_served_on_what_it_was_trained_on(settings: dict[str, Any]) -> None:
    """Fails if a Decision Module that learned from the base model's values is folded over those of the trained LoRA."""
    artifact, stage, _ = run(settings | RECIPES["paper"] | {"learning_rate": 0.05})
    assert isinstance(stage.routing, LearnedRouting)
    expected = FoldedDecision.fold(stage.routing.decision, value_table(load_model(settings["model"])))
    trained = FoldedDecision.fold(stage.routing.decision, value_table(stage.model))
    assert artifact.decision is not None
    assert not np.array_equal(expected.table_context, trained.table_context)
    assert np.array_equal(artifact.decision.table_context, expected.table_context)


def test_full_depth_is_the_base_model_to_the_last_bit(settings: dict[str, Any]) -> None:
    """Fails if a bypass changes a request at budget 1.0."""
    artifact, _, _ = run(settings)
    model = load_model(settings["model"])
    tokens = list(range(40, 60))
    full = [(1 << NUM_LAYERS) - 1] * len(tokens)
    with_bypass = routed_logits(model, tokens, full, "masked", bypass=artifact.bypass)
    assert torch.equal(with_bypass, routed_logits(model, tokens, full, "masked"))


@pytest.mark.parametrize("name", ["bypass", "paper"])
def test_two_runs_of_one_seed_are_one_run(settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Fails if a second run with the same seed gives other losses, or a run with another seed the same."""
    first, _, losses = run(settings | RECIPES[name])
    second, _, again = run(settings | RECIPES[name] | {"out": tmp_path / "again", "name": "run"})
    assert losses == again
    assert first.digest == second.digest
    _, _, other = run(settings | RECIPES[name] | {"out": tmp_path / "other", "seed": 1})
    assert other != losses


def test_many_sources_fit_into_the_artifacts_record(settings: dict[str, Any], data: Path, tmp_path: Path) -> None:
    """Fails if a run of many sources ends, when all is trained, in a name that is too long for the artifact."""
    sources = []
    for number in range(12):
        (tmp_path / f"{number:060}.txt").write_text(data.read_text())
        sources.append({"file": tmp_path / f"{number:060}.txt"})
    artifact, _, _ = run(settings | {"data": sources})
    artifact.save(tmp_path / "saved")
    assert load_artifact(tmp_path / "saved").config.prior.calibration.endswith("...")


def test_checkpointed_activations_change_nothing_but_memory(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if activations are kept all the same, gradients differ, or a stopped run cannot switch to it."""
    calls: list[int] = []
    checkpointed = batched.checkpointed

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(losses))
        return checkpointed(*args, **kwargs)

    monkeypatch.setattr(batched, "checkpointed", counted)
    again = settings | {"out": tmp_path / "again", "checkpoint_activations": True}
    losses: list[list[float]] = []
    for one in (settings, again):
        losses.append(run(one)[2])
    assert set(calls) == {1}
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert Stage1Settings(**settings).digest == Stage1Settings(**again).digest


def test_the_closed_form_start_keeps_no_activations(settings: dict[str, Any]) -> None:
    """Fails if the start of a run that recomputes activations keeps them, or begins with another bypass."""
    model = load_model(settings["model"]).requires_grad_(False)
    windows = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    kept: list[int] = []
    found = []
    for again in (False, True):
        kept.append(0)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            found.append(fit_bypass(model, windows, 4, checkpoint=again))
    assert torch.equal(found[0].up, found[1].up)
    assert torch.equal(found[0].down, found[1].down)
    assert kept[1] < kept[0] / 4


def test_orders_of_another_model_come_from_a_file(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a static order is not taken from the file, or is found missing only after the model was loaded."""
    static = settings | {"recipe": "distill", "paths": "shortgpt"}
    with monkeypatch.context() as patched:
        patched.setattr("vllm_buddy.training.stage1.load_base", None)
        with pytest.raises(BuddyError, match="vllm-buddy orders FILE --methods shortgpt"):
            run(static)
    layers = [3, 5, 1, 2, 4, 6]
    order = LayerOrder(
        method="shortgpt", calibration="x", calibration_sha256="0", num_tokens=1, window=1, layers=layers
    )
    OrderFile(base_model=identify(settings["model"]), orders=[order]).save(tmp_path / "orders.json")
    artifact, stage, _ = run(static | {"orders": tmp_path / "orders.json"})
    library = artifact.config.library
    assert library is not None
    assert library[NUM_LAYERS - 2][0] == [0, 1, 2, 4, 6, 7]
    assert stage.settings.orders is not None
