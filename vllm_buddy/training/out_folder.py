"""Keeps commands that add a part to an artifact from overwriting another one."""

from collections.abc import Callable
from pathlib import Path

from vllm_buddy.artifact import CONFIG_FILE, Artifact, load_artifact
from vllm_buddy.errors import ArtifactError, TrainingError


def check_out(out: Path, source: Path, artifact: Artifact, without: Callable[[Artifact], Artifact]) -> None:
    """Raise a TrainingError if `out` holds an artifact that is lost when a part is added to the one of `source`.

    That one may be there, and so may what it became when the same part was added before. without: takes the part away.
    """
    if not (out / CONFIG_FILE).exists() or out.resolve() == source.resolve():
        return
    try:
        known = without(load_artifact(out)).digest == without(artifact).digest
    except ArtifactError:
        known = False
    if not known:
        raise TrainingError(
            f"{out} holds another artifact than {source}, which would be lost; name another `out`, or remove it"
        )
