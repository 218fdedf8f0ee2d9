"""What an artifact computes: its repair, its router, and a digest that tells it from others."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.artifact import parts
from vllm_buddy.artifact import load_artifact, shipped_artifacts
from vllm_buddy.errors import ArtifactError
from vllm_buddy.method import path_of


@pytest.mark.parametrize(
    ("trained", "repair"),
    [({}, "none"), ({"lora": parts.lora()}, "lora"), ({"bypass": parts.bypass(), "lora": parts.lora()}, "bypass")],
)
def test_repair_says_what_runs_on_skipped_rows(trained: dict[str, Any], repair: str) -> None:
    """Fails if an artifact that computes a bypass on skipped layers is reported as one that computes nothing there."""
    assert parts.artifact(**trained).repair == repair


@pytest.mark.parametrize(
    ("decision", "library", "own"), [(True, parts.LIBRARY, True), (True, None, False), (False, parts.LIBRARY, False)]
)
def test_the_library_is_used_where_a_decision_module_was_trained_on_it(decision, library, own) -> None:
    """Fails if a router that was trained on the library's paths chooses freely, or another one uses the library."""
    artifact = parts.artifact(decision=parts.folded() if decision else None, library=library)
    assert (artifact.router().depths is not None) == own
    assert artifact.router(library=False).depths is None


def test_loaded_artifact_routes_as_the_saved_one(folder: Path) -> None:
    """Fails if the library is loaded with its depths as strings, or the router is built with another prior."""
    for library in (False, True):
        artifacts = parts.artifact(library=parts.LIBRARY), load_artifact(folder)
        routers = [artifact.router(library=library) for artifact in artifacts]
        for token in range(20):
            paths = []
            for router in routers:
                context = router.new_context()
                assert context is not None
                context.extend([token])
                paths.append(router.path(context, 4))
            assert paths[0] == paths[1]
            assert not library or paths[0] in [path_of(layers) for layers in parts.LIBRARY[4]]


def test_digest_changes_with_whatever_can_change_what_is_computed() -> None:
    """Fails if two artifacts have the same digest, so that one reads the other's entries of the prefix cache."""
    artifact = parts.artifact()
    assert artifact.decision is not None
    b2 = artifact.decision.b2.copy()
    b2[0] += 1e-3
    bypass, lora = parts.artifact(bypass=parts.bypass()), parts.artifact(lora=parts.lora())
    up, a = parts.bypass().up, dict(parts.lora().a)
    up[0, 0, 0] += 1.0
    a["model.layers.0.mlp.down_proj"] = 2 * a["model.layers.0.mlp.down_proj"]
    others = [
        bypass,
        dataclasses.replace(bypass, bypass=dataclasses.replace(parts.bypass(), up=up)),
        lora,
        dataclasses.replace(lora, lora=dataclasses.replace(parts.lora(), a=a)),
        parts.artifact(decision=False),
        parts.artifact(library=parts.LIBRARY),
        dataclasses.replace(artifact, prior=artifact.prior[::-1].copy()),
        dataclasses.replace(artifact, decision=dataclasses.replace(artifact.decision, b2=b2)),
        dataclasses.replace(artifact, config=artifact.config.model_copy(update={"omega": 0.2})),
    ]
    assert len({a.digest for a in (artifact, *others)}) == 10


def test_asking_for_a_missing_library(tmp_path: Path) -> None:
    """Fails if `paths: library` with an artifact that has no library silently chooses among all paths."""
    with pytest.raises(ArtifactError, match="artifact 'round-trip' has no path library; serve it with"):
        parts.artifact().router(library=True)


def test_shipped_artifacts_load() -> None:
    """Fails if a shipped artifact cannot be loaded, or has no model card or record."""
    shipped = shipped_artifacts()
    assert "smollm2-135m" in shipped
    for name, path in shipped.items():
        assert load_artifact(path).config.name == name
        assert (path / "README.md").is_file()
        assert (path / "run.yaml").is_file()
