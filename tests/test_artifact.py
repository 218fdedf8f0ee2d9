"""The artifact on disk: round trip, and each kind of damage."""

import dataclasses
import json
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.method.random_router import NUM_LAYERS, VOCAB_SIZE, random_decision
from vllm_buddy.artifact import (
    CONFIG_FILE,
    FORMAT_VERSION,
    WEIGHTS_FILE,
    Artifact,
    BuddyConfig,
    PriorConfig,
    load_artifact,
    shipped_artifacts,
)
from vllm_buddy.errors import ArtifactError
from vllm_buddy.fingerprint import BaseModelIdentity
from vllm_buddy.method import path_of

BASE = BaseModelIdentity(
    id="tiny", architecture="LlamaForCausalLM", num_layers=NUM_LAYERS, hidden_size=8, vocab_size=VOCAB_SIZE,
    fingerprint="0123456789abcdef",
)  # fmt: skip
LIBRARY = {4: [[0, 1, 2, 9], [0, 1, 3, 9]], 5: [[0, 1, 2, 3, 9]]}


def _artifact(*, decision: bool = True, library: dict[int, list[list[int]]] | None = None) -> Artifact:
    config = BuddyConfig(
        format_version=FORMAT_VERSION,
        name="round-trip",
        base_model=BASE,
        prior=PriorConfig(indicator="taylor", calibration="random", num_tokens=17),
        has_decision_module=decision,
        library=library,
    )
    prior = np.random.default_rng(0).standard_normal(NUM_LAYERS - 2).astype(np.float32)
    return Artifact(config, prior, random_decision() if decision else None)


@pytest.fixture
def folder(tmp_path: FilePath) -> FilePath:
    _artifact(library=LIBRARY).save(tmp_path / "artifact")
    return tmp_path / "artifact"


def _edit_config(folder: FilePath, **changes: Any) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(raw | changes))


def _edit_tensors(folder: FilePath, **changes: np.ndarray | None) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    for name, array in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if array is not None:
            tensors[name] = array
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize("decision", [False, True])
@pytest.mark.parametrize("library", [None, LIBRARY])
def test_round_trip(tmp_path: FilePath, decision: bool, library: dict[int, list[list[int]]] | None) -> None:
    """Failure: what is served differs in any number from what was trained, or its digest from run to run."""
    artifact = _artifact(decision=decision, library=library)
    artifact.save(tmp_path)
    loaded = load_artifact(tmp_path)
    assert loaded.config == artifact.config
    assert loaded.digest == artifact.digest
    np.testing.assert_array_equal(loaded.prior, artifact.prior)
    assert (loaded.decision is None) == (not decision)
    if loaded.decision is not None and artifact.decision is not None:
        for field in dataclasses.fields(artifact.decision):
            np.testing.assert_array_equal(getattr(loaded.decision, field.name), getattr(artifact.decision, field.name))


def test_loaded_artifact_routes_as_the_saved_one(folder: FilePath) -> None:
    """Failure: the library comes back with its depths as strings, or the router is built with another prior."""
    for library in (False, True):
        routers = _artifact(library=LIBRARY).router(library=library), load_artifact(folder).router(library=library)
        for token in range(20):
            paths = []
            for router in routers:
                context = router.new_context()
                assert context is not None
                context.extend([token])
                paths.append(router.path(context, 4))
            assert paths[0] == paths[1]
            assert not library or paths[0] in [path_of(layers) for layers in LIBRARY[4]]


def test_config_keeps_a_path_on_one_line(folder: FilePath) -> None:
    """Failure: a library of a 30-layer model is written with one number a line, thousands of lines."""
    assert "      [0, 1, 3, 9]\n" in (folder / CONFIG_FILE).read_text()


def test_digest_changes_with_whatever_can_change_a_path() -> None:
    """Failure: two artifacts share prefix-cache salts, and one is served the other's KV."""
    artifact = _artifact()
    assert artifact.decision is not None
    b2 = artifact.decision.b2.copy()
    b2[0] += 1e-3
    others = [
        _artifact(decision=False),
        _artifact(library=LIBRARY),
        dataclasses.replace(artifact, prior=artifact.prior[::-1].copy()),
        dataclasses.replace(artifact, decision=dataclasses.replace(artifact.decision, b2=b2)),
        dataclasses.replace(artifact, config=artifact.config.model_copy(update={"omega": 0.2})),
    ]
    assert len({a.digest for a in (artifact, *others)}) == 6


def test_asking_for_a_missing_library(tmp_path: FilePath) -> None:
    """Failure: `paths: library` on an artifact without one routes freely in silence."""
    with pytest.raises(ArtifactError, match="artifact 'round-trip' has no path library; serve it with"):
        _artifact().router(library=True)


def test_missing_folder_and_files(folder: FilePath) -> None:
    """Failure: a mistyped artifact name ends in a traceback about a file deep inside."""
    with pytest.raises(ArtifactError, match=f"no artifact at {folder / 'no'}: {CONFIG_FILE} is missing"):
        load_artifact(folder / "no")
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(ArtifactError, match=f"has no {WEIGHTS_FILE}"):
        load_artifact(folder)


@pytest.mark.parametrize("kept_fraction", [0.0, 0.1, 0.9])
def test_truncated_weights(folder: FilePath, kept_fraction: float) -> None:
    """Failure: an interrupted download is served with whatever was there."""
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: int(kept_fraction * len(data))])
    with pytest.raises(ArtifactError, match="is not a complete safetensors file .* get the artifact again"):
        load_artifact(folder)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"text"', "\ufffe"])
def test_config_that_is_not_a_json_object(folder: FilePath, text: str) -> None:
    """Failure: a config of another shape raises a TypeError instead of naming the file."""
    (folder / CONFIG_FILE).write_bytes(text.encode("utf-16") if text == "\ufffe" else text.encode())
    with pytest.raises(ArtifactError, match=f"{CONFIG_FILE} (is not JSON|does not fit the schema)"):
        load_artifact(folder)


def test_newer_format(folder: FilePath) -> None:
    """Failure: an artifact of a later vllm_buddy is read as if its fields still meant the same."""
    _edit_config(folder, format_version=FORMAT_VERSION + 1, something_new=[1, 2])
    with pytest.raises(ArtifactError, match=r"has format version 2, this vllm_buddy reads up to 1; update vllm_buddy"):
        load_artifact(folder)


def test_unknown_and_missing_fields(folder: FilePath) -> None:
    """Failure: a misspelt field is dropped, and its default is served."""
    _edit_config(folder, omegaa=0.3)
    with pytest.raises(ArtifactError, match="(?s)does not fit the schema.*omegaa"):
        load_artifact(folder)
    (folder / CONFIG_FILE).write_text(json.dumps({"format_version": FORMAT_VERSION}))
    with pytest.raises(ArtifactError, match="(?s)does not fit the schema.*base_model"):
        load_artifact(folder)


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
def test_wrong_shapes(folder: FilePath, name: str, array: np.ndarray | None) -> None:
    """Failure: tables of another vocabulary or depth are indexed until a token id is out of range, mid-service."""
    _edit_tensors(folder, **{name: array})
    with pytest.raises(ArtifactError, match=rf"'{name.replace('__', '.')}' has shape .*expected .*tiny \(Llama"):
        load_artifact(folder)


def test_widths_that_disagree(folder: FilePath) -> None:
    """Failure: two tables of different width pass the shape check one by one and fail at the first request."""
    _edit_tensors(folder, decision__table_newest=np.zeros((VOCAB_SIZE, 5), np.float32))
    with pytest.raises(ArtifactError, match=r"disagree on its width: \[5, 6\]"):
        load_artifact(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(folder: FilePath, value: float) -> None:
    """Failure: NaN from a diverged training sorts first, and every request runs the same arbitrary path."""
    _edit_tensors(folder, prior=np.full(8, value, np.float32))
    with pytest.raises(ArtifactError, match="tensor 'prior' holds values that are not finite"):
        load_artifact(folder)


@pytest.mark.parametrize(
    "layers",
    [[0, 1, 9], [0, 1, 2, 3, 9], [1, 2, 3, 9], [0, 1, 2, 8], [0, 1, 9, 10], [-1, 0, 1, 9], [0, 1, 1, 9], []],
)
def test_library_paths_that_are_no_paths(folder: FilePath, layers: list[int]) -> None:
    """Failure: a library path of another depth breaks the promise of a budget, or drops the last layer."""
    _edit_config(folder, library={"4": [[0, 1, 2, 9], layers]})
    with pytest.raises(ArtifactError, match="is not a set of 4 layers with 0 and 9"):
        load_artifact(folder)


def test_library_without_paths_at_a_depth(folder: FilePath) -> None:
    """Failure: an empty list is a depth the router believes it has, and the first request there stops the engine."""
    _edit_config(folder, library={"4": []})
    with pytest.raises(ArtifactError, match="the library holds no path of 4 layers"):
        load_artifact(folder)


def test_shipped_artifacts_load() -> None:
    """Failure: an artifact in the package does not pass the checks its own loader makes."""
    shipped = shipped_artifacts()
    assert "smollm2-135m" in shipped
    for name, path in shipped.items():
        assert load_artifact(path).config.name == name
        assert (path / "README.md").is_file() and (path / "run.yaml").is_file()
