"""Finds the folder of the artifact that a user names."""

from pathlib import Path

from vllm_buddy.artifact.artifact import load_artifact
from vllm_buddy.artifact.fingerprint import BaseModelIdentity
from vllm_buddy.artifact.shipped import shipped_artifacts
from vllm_buddy.errors import ArtifactError


def artifact_folder(name: str | None, base: BaseModelIdentity) -> Path:
    """Folder of a shipped artifact's name, or `name` itself; None: of the shipped artifact for the model `base`.

    Raises:
        ArtifactError: no shipped one is for that model.
    """
    shipped = shipped_artifacts()
    if name is not None:
        return shipped.get(name, Path(name))
    for folder in shipped.values():
        if load_artifact(folder).config.base_model.same_model(base):
            return folder
    raise ArtifactError(
        f"no shipped artifact fits the model {base.summary()}; shipped are {', '.join(shipped)}. Name one that does"
    )
