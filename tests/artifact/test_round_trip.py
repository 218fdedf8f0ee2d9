"""Saving an artifact and loading it again."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.artifact import parts
from tests.harness.random_router import VOCAB_SIZE
from vllm_buddy.artifact import CONFIG_FILE, WEIGHTS_FILE, load_artifact, with_drafts
from vllm_buddy.errors import ArtifactError
from vllm_buddy.method import FoldedDecision


@pytest.mark.parametrize("decision", [False, True])
@pytest.mark.parametrize("library", [None, parts.LIBRARY])
def test_round_trip(tmp_path: Path, decision: bool, library: dict[int, list[list[int]]] | None) -> None:
    """Fails if a loaded artifact differs from the saved one in any number, or its digest changes between runs."""
    artifact = parts.artifact(decision=decision, library=library)
    artifact.save(tmp_path)
    loaded = load_artifact(tmp_path)
    assert loaded.config == artifact.config
    assert loaded.digest == artifact.digest
    np.testing.assert_array_equal(loaded.prior, artifact.prior)
    assert (loaded.decision is None) == (not decision)
    if loaded.decision is not None and artifact.decision is not None:
        for field in dataclasses.fields(artifact.decision):
            np.testing.assert_array_equal(getattr(loaded.decision, field.name), getattr(artifact.decision, field.name))


def test_a_rounded_bypass_takes_a_byte_a_weight(tmp_path: Path) -> None:
    """Fails if a rounded bypass is stored in 16 bits, or the loaded weights differ from the rounded ones."""
    given = parts.bypass()
    rounded = given.rounded()
    parts.artifact(bypass=rounded).save(tmp_path)
    stored = load_file(tmp_path / WEIGHTS_FILE)
    assert stored["bypass.down"].dtype == stored["bypass.up"].dtype == np.int8
    loaded = load_artifact(tmp_path).bypass
    assert loaded
    assert torch.equal(loaded.down, rounded.down)
    assert torch.equal(loaded.up, rounded.up)
    for weight, other in ((given.down, rounded.down), (given.up, rounded.up)):
        assert bool(((weight - other).abs() <= weight.abs().amax(dim=-1, keepdim=True) / 253).all())


def test_round_trip_of_what_was_trained(tmp_path: Path) -> None:
    """Fails if the loaded tables, bypass or LoRA differ in a bit from those that training measured."""
    artifact = parts.artifact(decision=parts.folded(), bypass=parts.bypass(), lora=parts.lora())
    artifact.save(tmp_path)
    loaded = load_artifact(tmp_path)
    assert loaded.digest == artifact.digest
    assert loaded.config == artifact.config
    assert loaded.decision
    assert loaded.bypass
    assert loaded.lora
    assert artifact.decision
    assert artifact.bypass
    for field in dataclasses.fields(FoldedDecision):
        np.testing.assert_array_equal(getattr(loaded.decision, field.name), getattr(artifact.decision, field.name))
    assert load_file(tmp_path / WEIGHTS_FILE)["decision.table_newest"].dtype == np.int8
    assert torch.equal(loaded.bypass.down, artifact.bypass.down)
    assert torch.equal(loaded.bypass.up, artifact.bypass.up)
    assert (loaded.bypass.eps, loaded.lora.alpha) == (parts.EPS, 4.0)
    for part in ("a", "b"):
        found, wanted = getattr(loaded.lora, part), getattr(parts.lora(), part)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("rounded", [True, False])
def test_round_trip_of_draft_exits(tmp_path: Path, rounded: bool) -> None:
    """Fails if exits are loaded in another order, with other weights, or take more than a byte a weight if rounded."""
    artifact = with_drafts(parts.artifact(bypass=parts.bypass()), parts.exits(rounded=rounded))
    artifact.save(tmp_path)
    loaded = load_artifact(tmp_path)
    assert loaded.config == artifact.config
    assert loaded.digest == artifact.digest != artifact.without_drafts().digest
    assert artifact.without_drafts().digest == parts.artifact(bypass=parts.bypass()).digest
    for found, wanted in zip(loaded.drafts, parts.exits(rounded=rounded), strict=True):
        assert found.path == wanted.path
        assert torch.equal(found.adapter.down, wanted.adapter.down)
        assert torch.equal(found.adapter.up, wanted.adapter.up)
        assert found.adapter.eps == parts.EPS
    assert load_file(tmp_path / WEIGHTS_FILE)["drafts.up"].dtype == (np.int8 if rounded else np.float16)


@pytest.mark.parametrize("rounded", [True, False])
def test_round_trip_of_the_bypasses_of_gaps(tmp_path: Path, rounded: bool) -> None:
    """Fails if a gap gets the bypass of another, of another exit, or a digest does not tell one from the other."""
    exits = parts.exits(rounded=rounded, gaps=True)
    artifact = with_drafts(parts.artifact(bypass=parts.bypass()), exits)
    artifact.save(tmp_path)
    loaded = load_artifact(tmp_path)
    assert loaded.config.drafts is not None
    assert loaded.config.drafts.gaps
    without_gaps = with_drafts(parts.artifact(bypass=parts.bypass()), parts.exits(rounded=rounded))
    assert loaded.digest == artifact.digest != without_gaps.digest
    for found, wanted, firsts in zip(loaded.drafts, exits, [(2, 5), (2, 6)], strict=True):
        assert found.bypass is not None
        assert wanted.bypass is not None
        assert found.bypass.layers == wanted.bypass.layers == firsts
        assert torch.equal(found.bypass.down, wanted.bypass.down)
        assert torch.equal(found.bypass.up, wanted.bypass.up)
    assert load_file(tmp_path / WEIGHTS_FILE)["drafts.bypass.up"].dtype == (np.int8 if rounded else np.float16)


def test_round_trip_of_the_tokens_that_drafts_choose_among(tmp_path: Path) -> None:
    """Fails if drafts choose among other tokens than were saved, or artifacts that differ in them have one digest."""
    some = np.array([0, 3, VOCAB_SIZE - 1])
    artifact = with_drafts(parts.artifact(), parts.exits(), some)
    artifact.save(tmp_path)
    loaded = load_artifact(tmp_path)
    assert loaded.config.drafts is not None
    assert loaded.config.drafts.vocabulary == 3
    np.testing.assert_array_equal(loaded.draft_vocabulary, some)
    assert loaded.digest == artifact.digest != with_drafts(parts.artifact(), parts.exits(), some[1:]).digest
    assert loaded.without_drafts().draft_vocabulary is None
    assert loaded.without_drafts().digest == parts.artifact().digest


def test_config_keeps_a_path_on_one_line(folder: Path) -> None:
    """Fails if a path library is written with one number per line, which takes thousands of lines for 30 layers."""
    assert "      [0, 1, 3, 9]\n" in (folder / CONFIG_FILE).read_text()


def test_weights_that_the_configuration_does_not_mention(tmp_path: Path) -> None:
    """Fails if weights that do not match the configuration are saved, and are then ignored when serving."""
    plain = parts.artifact()
    with pytest.raises(ArtifactError, match=r"says nothing of tensor 'bypass.down'"):
        dataclasses.replace(plain, bypass=parts.bypass()).save(tmp_path)
    with pytest.raises(ArtifactError, match=r"predictor.depths and drafts of the configuration are .*1e-05, .*0.1"):
        other_eps = dataclasses.replace(parts.bypass(), eps=0.1)
        dataclasses.replace(parts.artifact(bypass=parts.bypass()), bypass=other_eps).save(tmp_path)
    with pytest.raises(ArtifactError, match=r"'bypass.down' holds values that are not finite"):
        too_large = dataclasses.replace(parts.bypass(), down=1e6 * parts.bypass().down)
        parts.artifact(bypass=too_large).save(tmp_path)
    with pytest.raises(ArtifactError, match=r"says nothing of tensor 'drafts.down'"):
        dataclasses.replace(plain, drafts=tuple(parts.exits())).save(tmp_path)
    assert list(tmp_path.iterdir()) == []
