"""Keeps commands that train, or add a part to an artifact, from overwriting another one."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vllm_buddy.artifact import CONFIG_FILE, Artifact, load_artifact
from vllm_buddy.errors import ArtifactError, TrainingError
from vllm_buddy.training.checkpoint import CHECKPOINT_FILE, START_FILE


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


def check_run_folder(out: Path, start_from: Path | str | None) -> None:
    """Raise a TrainingError if a run of stage 1 in `out` would replace an artifact that it did not make itself.

    start_from: as in the settings; what this one has beside its repair, the run keeps.
    """
    if not (out / CONFIG_FILE).exists():
        return
    if start_from is not None and Path(start_from).resolve() == out.resolve():
        raise TrainingError(f"start_from and out are both {out}, whose artifact would be lost; name another `out`")
    if not any((out / name).exists() for name in (START_FILE, CHECKPOINT_FILE)):
        raise TrainingError(f"{out} holds an artifact of another origin, which would be lost; name another `out`")
    with suppress(ArtifactError):
        found = load_artifact(out)
        added = ["a Budget Predictor"] * (found.predictor is not None) + ["draft exits"] * bool(found.drafts)
        if added and start_from is None:
            raise TrainingError(
                f"the artifact in {out} has got {' and '.join(added)} since it was trained, which the run would drop; "
                "move that artifact elsewhere, or name another `out`"
            )
