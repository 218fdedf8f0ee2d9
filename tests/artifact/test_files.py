"""Writing an artifact where that fails."""

from pathlib import Path

import pytest

from tests.harness.full_disk import full_disk
from tools.fuzzing.artifacts import write_sample
from vllm_buddy.artifact import load_artifact
from vllm_buddy.errors import ArtifactError


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """Fails if half an artifact is left, which the next start would find, or the user gets a traceback."""
    write_sample(tmp_path / "sample")
    artifact = load_artifact(tmp_path / "sample")
    with full_disk(), pytest.raises(ArtifactError, match=r"cannot write the artifact to .*new: File too large"):
        artifact.save(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_leaves_the_artifact_that_was_there(tmp_path: Path) -> None:
    """Fails if an artifact is lost because a new one could not be written over it."""
    write_sample(tmp_path / "sample")
    artifact = load_artifact(tmp_path / "sample")
    before = {path.name: path.read_bytes() for path in (tmp_path / "sample").iterdir()}
    with full_disk(), pytest.raises(ArtifactError):
        artifact.without_predictor().save(tmp_path / "sample")
    assert {path.name: path.read_bytes() for path in (tmp_path / "sample").iterdir()} == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """Fails if a file in the way ends in a traceback."""
    write_sample(tmp_path / "sample")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="Not a directory"):
        load_artifact(tmp_path / "sample").save(tmp_path / "file" / "artifact")
