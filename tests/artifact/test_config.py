"""Configurations that are no configuration of an artifact."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.artifact import parts
from tests.harness.random_router import NUM_LAYERS, VOCAB_SIZE
from vllm_buddy.artifact import CONFIG_FILE, load_artifact, with_drafts
from vllm_buddy.artifact.config import FORMAT_VERSION
from vllm_buddy.errors import ArtifactError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exits": []}, "exits"),
        ({"exits": [[0, 1, 4, 9], [0, 2, 5, 6, 9]]}, "each path must be a subset of the next"),
        ({"exits": [[0, 4, 1, 9], [0, 1, 4, 5, 9]]}, "must ascend"),
        ({"exits": [[0, 1, 4, 8], [0, 1, 4, 5, 8]]}, "an exit holds layers 0 and 9"),
        ({"exits": [[0, 9], [0, 1, 9]]}, "at least 3 layers"),
        ({"exits": [[0, 1, 9], list(range(NUM_LAYERS))]}, "not all"),
        ({"rank": 0}, "rank"),
        ({"eps": float("nan")}, "eps"),
        ({"alpha": 1.0}, "alpha"),
        ({"vocabulary": 0}, "vocabulary"),
        ({"vocabulary": VOCAB_SIZE}, f"of which the model has {VOCAB_SIZE}"),
    ],
)
def test_exits_that_cannot_draft(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Fails if a path that the model cannot run, or a misspelt field, is found only when a request is served."""
    artifact = with_drafts(parts.artifact(), parts.exits())
    artifact.save(tmp_path)
    raw = json.loads((tmp_path / CONFIG_FILE).read_text())
    parts.edit_config(tmp_path, drafts=raw["drafts"] | change)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"text"', "\ufffe"])
def test_config_that_is_not_a_json_object(folder: Path, text: str) -> None:
    """Fails if a configuration that is no JSON object raises a TypeError instead of an error that names the file."""
    (folder / CONFIG_FILE).write_bytes(text.encode("utf-16") if text == "\ufffe" else text.encode())
    with pytest.raises(ArtifactError, match=f"{CONFIG_FILE} (is not JSON|does not fit the schema)"):
        load_artifact(folder)


def test_unknown_and_missing_fields(folder: Path) -> None:
    """Fails if a misspelt field is ignored and its default is used, or a required field may be missing."""
    parts.edit_config(folder, omegaa=0.3)
    with pytest.raises(ArtifactError, match=r"(?s)does not fit the schema.*omegaa"):
        load_artifact(folder)
    (folder / CONFIG_FILE).write_text(json.dumps({"format_version": FORMAT_VERSION}))
    with pytest.raises(ArtifactError, match=r"(?s)does not fit the schema.*base_model"):
        load_artifact(folder)


@pytest.mark.parametrize(
    "layers",
    [[0, 1, 9], [0, 1, 2, 3, 9], [1, 2, 3, 9], [0, 1, 2, 8], [0, 1, 9, 10], [-1, 0, 1, 9], [0, 1, 1, 9], []],
)
def test_library_paths_that_are_no_paths(folder: Path, layers: list[int]) -> None:
    """Fails if a library path has another depth than its budget promises, or lacks the first or last layer."""
    parts.edit_config(folder, library={"4": [[0, 1, 2, 9], layers]})
    with pytest.raises(ArtifactError, match="is not a set of 4 layers with 0 and 9"):
        load_artifact(folder)


def test_library_without_paths_at_a_depth(folder: Path) -> None:
    """Fails if the library may list a depth without paths, and the first request at that depth stops the engine."""
    parts.edit_config(folder, library={"4": []})
    with pytest.raises(ArtifactError, match="the library holds no path of 4 layers"):
        load_artifact(folder)


def test_a_library_without_paths_is_refused(tmp_path: Path) -> None:
    """Fails if a server starts with a router that has nothing to choose from, or ends in a traceback."""
    parts.artifact(library=parts.LIBRARY).save(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"library": {}}))
    with pytest.raises(ArtifactError, match="library"):
        load_artifact(tmp_path)
