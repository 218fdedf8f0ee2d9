"""Artifacts of older and newer format versions."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.artifact import parts
from vllm_buddy.artifact import CONFIG_FILE, WEIGHTS_FILE, load_artifact, with_drafts
from vllm_buddy.artifact.config import FORMAT_VERSION
from vllm_buddy.errors import ArtifactError


def test_format_version_1(folder: Path) -> None:
    """Fails if an artifact of format version 1, with tables in float32, is refused or read with other numbers."""
    artifact = load_artifact(folder)
    parts.edit_config(folder, format_version=1)
    raw = json.loads((folder / CONFIG_FILE).read_text())
    for name in ("recipe", "budgets", "bypass_rank", "bypass_eps", "lora"):
        del raw[name]
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    loaded = load_artifact(folder)
    assert loaded.decision is not None
    assert artifact.decision is not None
    assert load_file(folder / WEIGHTS_FILE)["decision.table_context"].dtype == np.float32
    np.testing.assert_array_equal(loaded.decision.table_context, artifact.decision.table_context)


def test_exits_without_bypasses_of_gaps_keep_their_digest(tmp_path: Path) -> None:
    """Fails if an artifact of format version 5, which knows no bypasses of gaps, is refused or gets another digest."""
    artifact = with_drafts(parts.artifact(), parts.exits())
    artifact.save(tmp_path)
    raw = json.loads((tmp_path / CONFIG_FILE).read_text())
    del raw["drafts"]["gaps"]
    assert '"gaps"' not in json.dumps(raw)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(raw | {"format_version": 5}))
    loaded = load_artifact(tmp_path)
    assert [draft.bypass for draft in loaded.drafts] == [None, None]
    assert loaded.digest == artifact.digest


def test_an_artifact_of_before_has_no_draft_exits(folder: Path) -> None:
    """Fails if an artifact of format version 4, which knows no exits, is refused or gets another digest."""
    digest = load_artifact(folder).digest
    raw = json.loads((folder / CONFIG_FILE).read_text())
    del raw["drafts"]
    (folder / CONFIG_FILE).write_text(json.dumps(raw | {"format_version": 4}))
    loaded = load_artifact(folder)
    assert loaded.drafts == ()
    assert loaded.digest == digest


def test_newer_format(folder: Path) -> None:
    """Fails if an artifact of a newer format version is loaded as if its fields had the same meaning."""
    parts.edit_config(folder, format_version=FORMAT_VERSION + 1, something_new=[1, 2])
    with pytest.raises(
        ArtifactError,
        match=f"has format version {FORMAT_VERSION + 1}, this vllm_buddy reads up to {FORMAT_VERSION}; update",
    ):
        load_artifact(folder)
