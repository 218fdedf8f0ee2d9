"""Training of depths per token: from measured divergences to an artifact that is better than chance."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.harness.full_disk import full_disk
from tests.harness.tiny_models import load_model, random_exits, random_predictor
from tests.training.conftest import run
from vllm_buddy.artifact import load_artifact, with_drafts
from vllm_buddy.artifact.config import PredictorConfig
from vllm_buddy.artifact.provenance import DRAFTS_HEADING, PREDICTOR_KEY, add_section
from vllm_buddy.errors import TrainingError
from vllm_buddy.method import TokenRoute, TokenSchedule, full_path, path_of
from vllm_buddy.method.decision import value_table
from vllm_buddy.training import draft_record, stage2_record
from vllm_buddy.training.observations import Observations
from vllm_buddy.training.stage1_record import finish_run
from vllm_buddy.training.stage1_settings import Stage1Settings
from vllm_buddy.training.token_fit import fit_tokens

VOCAB, LENGTH = 64, 40
TOKEN = {"schedule": "token", "token_depths": (4, 6), "kv_policy": "kv_only", "token_windows": 12}
KEPT = ((DRAFTS_HEADING, draft_record.RUN_KEY), (stage2_record.CARD_HEADING, PREDICTOR_KEY))
PATHS = (path_of([0, 2, 4, 7]), path_of([0, 1, 2, 4, 5, 7]), full_path(8))


FLOOR = 0.1  # what a token costs at full depth, because of shallower ones before it


def drawn(num_sequences: int, rng: np.random.Generator) -> tuple[Observations, np.ndarray]:
    """Sequences in which a token costs more the larger its id, and half of that at six layers, on paths at random."""
    tokens = rng.integers(0, VOCAB, (num_sequences, LENGTH))
    cost = tokens / VOCAB * 2.0 * rng.exponential(1.0, tokens.shape)
    choices = rng.integers(0, len(PATHS), tokens.shape).astype(np.int8)
    divergences = FLOOR + cost * np.array([1.0, 0.5, 0.0])[choices]
    return Observations(np.arange(num_sequences), choices, divergences.astype(np.float16)), tokens


def test_the_fit_finds_which_tokens_need_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the router's depths have nothing to do with what depths cost, or its prices miss the budgets."""
    monkeypatch.setattr("vllm_buddy.training.token_fit.STEPS", 400)
    rng = np.random.default_rng(0)
    values = torch.randn(VOCAB, 12, generator=torch.Generator().manual_seed(0))
    fit = fit_tokens(*drawn(150, rng), values, PATHS, 8, seed=0)
    # A fifth of the variance follows from the id; the rest is that of the exponential, which nobody can know.
    assert all(explained > 0.05 for explained in fit.explained), fit.explained
    tokens = rng.integers(0, VOCAB, 2000).tolist()
    for budget in (0.625, 0.75, 0.875):
        route = TokenRoute(fit.router, TokenSchedule(48), budget, tokens)
        route.decide(len(tokens), tokens)
        depths = np.array(fit.router.depths)[route.choices]
        assert 0.93 * budget * 8 < depths.mean() <= budget * 8
        costly, cheap = (depths[np.array(tokens) >= 48].mean(), depths[np.array(tokens) < 16].mean())
        assert costly > cheap + 0.5
    budgets, prices = zip(*fit.router.prices)
    assert list(budgets) == sorted(budgets)
    assert list(prices) == sorted(prices, reverse=True)


@pytest.fixture
def token_settings(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run that starts from the artifact of another one."""
    first, stage, _ = run(settings | {"out": tmp_path / "first"})
    finish_run(first, stage, Stage1Settings(**settings | {"out": tmp_path / "first"}), "vllm-buddy train", None)
    return settings | TOKEN | {"start_from": str(tmp_path / "first"), "out": tmp_path / "token"}


def test_training_writes_an_artifact_with_nested_paths(
    token_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if schedule token cannot be trained, what it does not train is lost, or what no longer fits is kept."""
    before = load_artifact(Path(token_settings["start_from"]))
    exits = random_exits(load_model(token_settings["model"]), (4,), seed=0)
    with_drafts(before, exits).save(Path(token_settings["start_from"]))
    monkeypatch.setattr("vllm_buddy.training.token_fit.STEPS", 50)
    artifact, stage, losses = run(token_settings)
    finish_run(artifact, stage, Stage1Settings(**token_settings), "vllm-buddy train", None)
    assert np.isfinite(losses).all()
    loaded, first = load_artifact(token_settings["out"]), load_artifact(Path(token_settings["start_from"]))
    assert loaded.digest == artifact.digest != first.digest
    assert loaded.token is not None
    assert loaded.token.depths == (4, 6, 8)
    assert loaded.drafts == ()  # trained with the bypass of before
    assert loaded.config.library == first.config.library
    assert not torch.equal(loaded.bypass.down, first.bypass.down)
    assert "schedule `token`" in (token_settings["out"] / "README.md").read_text()
    assert f"first {first.digest}" in (token_settings["out"] / "run.yaml").read_text()
    again, _, same = run(token_settings | {"out": token_settings["out"].parent / "again", "name": "token"})
    assert same == losses
    assert again.digest == artifact.digest


def test_predictor_and_exits_are_kept_where_they_are_of_use(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if more training of the bypass loses other parts, or what is known of them."""
    first, stage, _ = run(settings | {"out": tmp_path / "first"})
    finish_run(first, stage, Stage1Settings(**settings | {"out": tmp_path / "first"}), "vllm-buddy train", None)
    model = load_model(settings["model"])
    predictor = random_predictor(value_table(model), (4, 6, 8), 8, seed=0)
    config = first.config.model_copy(update={"predictor": PredictorConfig(depths=predictor.depths, price=1.0)})
    first = dataclasses.replace(first, config=config, predictor=predictor)
    whole = with_drafts(first, random_exits(model, (4,), seed=0, gaps=True))
    whole.save(folder := tmp_path / "first")
    record = {"seed": 7, "held_out": {"4": {"after": 0.5}}}
    for heading, key in KEPT:
        add_section(folder, folder, ("first", "tiny"), f"{heading}\n\nIt is good.\n\n", key, record)
    more = settings | {"start_from": str(tmp_path / "first"), "out": tmp_path / "more"}
    artifact, stage, _ = run(more)
    finish_run(artifact, stage, Stage1Settings(**more), "vllm-buddy train", None)
    loaded = load_artifact(tmp_path / "more")
    assert [draft.path for draft in loaded.drafts] == [draft.path for draft in whole.drafts]
    assert loaded.drafts[0].bypass is not None
    assert torch.equal(loaded.drafts[0].bypass.down, load_artifact(folder).drafts[0].bypass.down)
    assert loaded.config.predictor == whole.config.predictor
    assert loaded.predictor is not None
    assert np.array_equal(loaded.predictor.excess([1, 2, 3]), load_artifact(folder).predictor.excess([1, 2, 3]))
    card, told = ((tmp_path / "more" / name).read_text() for name in ("README.md", "run.yaml"))
    for heading, key in KEPT:
        assert card.count(heading) == card.count(f"{heading}\n\nIt is good.\n\n") == 1
        assert yaml.safe_load(told)[key] == record
    by_token = TOKEN | {"start_from": str(folder), "out": tmp_path / "token"}
    monkeypatch.setattr("vllm_buddy.training.token_fit.STEPS", 50)
    token, _, _ = run(settings | by_token)
    assert token.predictor is None
    assert token.drafts


def test_more_training_fits_the_router_again(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if the artifact keeps a router of other paths' losses, or settings of the second run are ignored."""
    with_router = settings | {"router_windows": 12, "library": 2}
    first, stage, _ = run(with_router | {"out": tmp_path / "first"})
    finish_run(first, stage, Stage1Settings(**with_router | {"out": tmp_path / "first"}), "vllm-buddy train", None)
    more = with_router | {"start_from": str(tmp_path / "first"), "seed": 1}
    artifact, _, _ = run(more | {"decide_every": 0})
    assert first.decision is not None
    assert artifact.decision is not None
    assert not np.array_equal(artifact.decision.w2, first.decision.w2)
    assert artifact.config.route_every == 0
    kept, _, _ = run(more | {"router_windows": 0, "out": tmp_path / "kept"})
    assert kept.decision is not None
    assert np.array_equal(kept.decision.w2, first.decision.w2)
    assert kept.config.route_every == first.config.route_every
    with pytest.raises(TrainingError, match="has rank 4; set rank to that"):
        run(more | {"rank": 8, "out": tmp_path / "other"})


def test_rows_that_were_not_run_are_no_observations(tmp_path: Path) -> None:
    """Fails if the router is fitted to tokens that cost nothing because nobody ran them."""
    observed = Observations.open(tmp_path, 4, LENGTH)
    observed.add(slice(0, 2), np.array([5, 6]), np.zeros((2, LENGTH), np.int8), torch.ones(2, LENGTH))
    longer = Observations.open(tmp_path, 8, LENGTH)
    assert longer.routed(slice(0, 8)).sequences.tolist() == [5, 6]


def test_what_an_unfinished_run_observed_is_no_obstacle_and_of_no_use(token_settings: dict[str, Any]) -> None:
    """Fails if a run that was stopped before its first checkpoint leaves rows in which the next one stumbles."""
    with pytest.raises(KeyboardInterrupt):
        run(token_settings, stop_after=1)
    _, stage, _ = run(token_settings | {"length": 40, "tokens": 6 * 4 * 40})
    assert stage.observations is not None
    assert stage.observations.choices.shape == (24, 40)
    with pytest.raises(TrainingError, match=r"observed_choices\.npy holds rows of int8 \[40\], those of this run"):
        run(token_settings)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """Fails if a disk that is full of observations is a traceback, or a half file takes the place of a whole."""
    observed = Observations.open(tmp_path, 4, LENGTH)
    file, folder = tmp_path / "measured.npz", tmp_path / "empty"
    folder.mkdir()
    observed.save(file, "first")
    with full_disk():
        with pytest.raises(TrainingError, match=r"cannot write .*measured\.npz: File too large"):
            observed.save(file, "second")
        with pytest.raises(TrainingError, match=r"cannot write what training observes to .*: File too large"):
            Observations.open(folder, 4, LENGTH)
    assert Observations.load(file, "first") is not None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"token_depths": ()}, "token_depths go with schedule token"),
        ({"schedule": "request"}, "token_depths go with schedule token"),
        ({"token_depths": (6, 4)}, "must ascend"),
        ({"kv_policy": "masked"}, "needs recipe bypass and kv_policy kv_only"),
        ({"token_depths": (2, 6)}, "no path of"),
        ({"start_from": "/no/such/artifact"}, "no artifact at"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    token_settings: dict[str, Any], changes: dict[str, Any], problem: str
) -> None:
    """Fails if a run of hours ends in an artifact without the schedule that was asked for."""
    with pytest.raises(ValueError, match=problem):
        run(token_settings | changes)


def test_an_artifact_without_bypass_or_library_is_no_start(token_settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if training starts from nothing where it was told to start from an artifact."""
    first = load_artifact(Path(token_settings["start_from"]))
    config = first.config.model_copy(update={"library": None})
    type(first)(config, first.prior, bypass=first.bypass).save(tmp_path / "bare")
    with pytest.raises(TrainingError, match="must have a bypass and a path library"):
        run(token_settings | {"start_from": str(tmp_path / "bare")})
