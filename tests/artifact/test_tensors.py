"""Tensors whose shape or values do not fit the configuration."""

from pathlib import Path

import numpy as np
import pytest

from tests.artifact import parts
from tests.harness.random_router import VOCAB_SIZE
from vllm_buddy.artifact import load_artifact, with_drafts
from vllm_buddy.errors import ArtifactError


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("drafts__bypass.down", np.zeros((3, parts.RANK, 8), np.float16), r"shape \(3, 3, 8\), expected \(4, 3, 8\)"),
        ("drafts__bypass.up", None, r"shape None, expected \(4, 8, 3\)"),
        ("drafts__bypass.up_scale", np.full(32, np.inf, np.float32), "not finite"),
    ],
)
def test_bypasses_of_gaps_of_wrong_shape(tmp_path: Path, name: str, array: np.ndarray | None, message: str) -> None:
    """Fails if bypasses that do not fit the gaps are loaded and stop the engine later."""
    with_drafts(parts.artifact(), parts.exits(gaps=True)).save(tmp_path)
    parts.edit_tensors(tmp_path, **{name: array})
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (None, rf"shape None, expected \({VOCAB_SIZE},\)"),
        (np.ones(VOCAB_SIZE - 1, np.int8), rf"expected \({VOCAB_SIZE},\)"),
        (np.ones(VOCAB_SIZE, np.int8), "by tensor 'drafts.vocabulary', among 3 by the configuration"),
    ],
)
def test_tokens_of_drafts_that_do_not_fit(tmp_path: Path, array: np.ndarray | None, message: str) -> None:
    """Fails if a vocabulary of another model, or another size than is said, is loaded and stops the engine later."""
    with_drafts(parts.artifact(), parts.exits(), np.arange(3)).save(tmp_path)
    parts.edit_tensors(tmp_path, drafts__vocabulary=array)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("drafts__down", np.zeros((1, parts.RANK, 8), np.float16), r"shape \(1, 3, 8\), expected \(2, 3, 8\)"),
        ("drafts__up", np.zeros((2, 8, 4), np.float16), r"shape \(2, 8, 4\), expected \(2, 8, 3\)"),
        ("drafts__up", None, r"shape None, expected \(2, 8, 3\)"),
        ("drafts__up_scale", None, r"shape None, expected \(16,\)"),
        ("drafts__up_scale", np.full(16, np.nan, np.float32), "not finite"),
        ("drafts__up_scale", np.full(16, 3e38, np.float32), "so large that its values are not finite"),
        ("drafts__alpha", np.zeros(1, np.float32), "says nothing of tensor 'drafts.alpha'"),
    ],
)
def test_adapters_of_wrong_shape(tmp_path: Path, name: str, array: np.ndarray | None, message: str) -> None:
    """Fails if adapters that do not fit the exits are loaded and stop the engine later."""
    with_drafts(parts.artifact(), parts.exits()).save(tmp_path)
    parts.edit_tensors(tmp_path, **{name: array})
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("prior", None),
        ("prior", np.zeros(7, np.float32)),
        ("prior", np.zeros((8, 1), np.float32)),
        ("decision__table_context", np.zeros((63, 6), np.float32)),
        ("decision__table_newest", None),
        ("decision__w2", np.zeros((7, 6), np.float32)),
        ("decision__b2", np.zeros(9, np.float32)),
    ],
)
def test_wrong_shapes(folder: Path, name: str, array: np.ndarray | None) -> None:
    """Fails if tables of another vocabulary or depth are loaded, and a token id is out of range during serving."""
    parts.edit_tensors(folder, **{name: array})
    with pytest.raises(ArtifactError, match=rf"'{name.replace('__', '.')}' has shape .*expected .*tiny \(Llama"):
        load_artifact(folder)


def test_widths_that_disagree(folder: Path) -> None:
    """Fails if tables of different width pass the check of single shapes and raise at the first request."""
    parts.edit_tensors(folder, decision__table_newest=np.zeros((VOCAB_SIZE, 5), np.float32))
    with pytest.raises(ArtifactError, match=r"disagree on their width: \[5, 6\]"):
        load_artifact(folder)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("bypass__down", np.zeros((8, 4, 8), np.float16), r"shape \(8, 4, 8\), expected \(8, 3, 8\)"),
        ("bypass__up", np.zeros((8, 3, 8), np.float16), r"shape \(8, 3, 8\), expected \(8, 8, 3\)"),
        ("bypass__up", None, r"shape None, expected \(8, 8, 3\)"),
        ("bypass__up", np.full((8, 8, 3), np.inf, np.float16), "not finite"),
        ("lora__model.layers.0.mlp.down_proj__a", np.zeros((3, 8), np.float16), r"\(3, 8\), expected \(2, None\)"),
        ("lora__model.layers.0.mlp.down_proj__b", None, r"shape None, expected \(None, 2\)"),
        ("lora__something__c", np.zeros(1, np.float16), "says nothing of tensor 'lora.something.c'"),
        ("decision__table_context_scale", np.ones(5, np.float32), r"disagree on their width: \[5, 6\]"),
        ("decision__table_context_scale", None, r"shape None, expected \(None,\)"),
    ],
)
def test_wrong_shapes_of_what_was_trained(tmp_path: Path, name: str, array: np.ndarray | None, message: str) -> None:
    """Fails if trained parts of wrong shape are loaded and stop the engine later, or are ignored silently."""
    parts.artifact(decision=parts.folded(), bypass=parts.bypass(), lora=parts.lora()).save(tmp_path)
    parts.edit_tensors(tmp_path, **{name: array})
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(folder: Path, value: float) -> None:
    """Fails if NaN or infinity from a diverged training is loaded, and every request runs the same arbitrary path."""
    parts.edit_tensors(folder, prior=np.full(8, value, np.float32))
    with pytest.raises(ArtifactError, match="tensor 'prior' holds values that are not finite"):
        load_artifact(folder)
