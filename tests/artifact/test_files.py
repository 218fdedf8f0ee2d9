"""Writing an artifact where that fails."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.harness.full_disk import full_disk
from tools.fuzzing.artifacts import write_sample
from vllm_buddy.artifact import CONFIG_FILE, load_artifact
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


def test_a_process_that_ends_between_two_files_leaves_no_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if new weights are left beside the old configuration, which loads without an error where shapes agree."""
    write_sample(tmp_path / "sample")
    artifact = load_artifact(tmp_path / "sample")
    replace_file = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target.name == CONFIG_FILE:
            raise KeyboardInterrupt
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        artifact.without_predictor().save(tmp_path / "sample")
    with pytest.raises(ArtifactError, match=CONFIG_FILE):
        load_artifact(tmp_path / "sample")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """Fails if a file in the way ends in a traceback."""
    write_sample(tmp_path / "sample")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="Not a directory"):
        load_artifact(tmp_path / "sample").save(tmp_path / "file" / "artifact")


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if training of hours ends in an artifact that no server loads."""
    write_sample(tmp_path / "sample")
    artifact = load_artifact(tmp_path / "sample")

    def refused(update: dict[str, Any], message: str) -> None:
        changed = replace(artifact, config=artifact.config.model_copy(update=update))
        with pytest.raises(ArtifactError, match=message):
            changed.save(tmp_path / "new")

    refused({"name": "two\nlines"}, "does not fit the schema: name")
    refused({"library": {3: [[0, 1]]}}, "is not a set of 3 layers")
    with monkeypatch.context() as patched:
        patched.setattr("vllm_buddy.artifact.files.MOST_WEIGHTS_BYTES", 100)
        refused({}, "GiB in memory; an artifact takes at most")
    monkeypatch.setattr("vllm_buddy.artifact.artifact.MOST_CONFIG_BYTES", 100)
    refused({}, "lower the number of paths in its library")
    assert not (tmp_path / "new").exists()
