"""Keeps commands that train, or add a part to an artifact, from overwriting what they have not made."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from vllm_buddy.artifact import CARD_FILE, CONFIG_FILE, RUN_FILE, Artifact, load_artifact, with_drafts
from vllm_buddy.errors import ArtifactError, TrainingError
from vllm_buddy.training.checkpoint import CHECKPOINT_FILE, START_FILE
from vllm_buddy.training.curves import CURVES_FILE
from vllm_buddy.training.loop import LOG_FILE
from vllm_buddy.training.start import EXPLORE_DIR, REGRESSION_FILE

# What a run of stage 1 has in its folder before there is an artifact, beside its log.
_OF_A_RUN = (
    START_FILE,
    CHECKPOINT_FILE,
    REGRESSION_FILE,
    EXPLORE_DIR,
    "teacher-*",
    "observed_*.npy",
    "measured*.npz",
    "*.partial",
)
_WRITTEN_LAST = (CARD_FILE, RUN_FILE, CURVES_FILE)  # after the artifact
_MEASURED = "losses-*"  # what stage 2 has in its folder before there is an artifact


def check_out(out: Path, source: Path, artifact: Artifact, without: Callable[[Artifact], Artifact]) -> None:
    """Raise a TrainingError if `out` holds what is lost when a part is added to the artifact of `source`.

    That one may be there, and so may what it became when the same part was added before. without: takes the part away.
    """
    if not (out / CONFIG_FILE).exists():
        _refuse(out, [name for name in _names(out) if not fnmatch(name, _MEASURED)])
        return
    if out.resolve() == source.resolve():
        return
    try:
        known = without(load_artifact(out)).digest == without(artifact).digest
    except ArtifactError:
        known = False
    if not known:
        raise TrainingError(
            f"{out} holds another artifact than {source}, which would be lost; name another `out`, or remove it"
        )


def check_run_folder(out: Path, start_from: Path | str | None, source: Artifact | None) -> None:
    """Raise a TrainingError if a run of stage 1 in `out` would replace what it did not make itself.

    start_from: as in the settings. source: the artifact that it names; what that has beside its repair, the run keeps.
    """
    if not (out / CONFIG_FILE).exists():
        _refuse(out, _not_of_a_run(out))
        return
    if start_from is not None and Path(start_from).resolve() == out.resolve():
        raise TrainingError(f"start_from and out are both {out}, whose artifact would be lost; name another `out`")
    if not any((out / name).exists() for name in (START_FILE, CHECKPOINT_FILE)):
        raise TrainingError(f"{out} holds an artifact of another origin, which would be lost; name another `out`")
    with suppress(ArtifactError):
        if added := _added(load_artifact(out), source):
            raise TrainingError(
                f"the artifact in {out} has got {' and '.join(added)} since it was trained, which the run would drop; "
                "move that artifact elsewhere, or name another `out`"
            )


def _added(found: Artifact, source: Artifact | None) -> list[str]:
    """The parts of `found` that `source` has not got, or has got otherwise."""
    known = None if source is None else source.digest
    parts = []
    if found.predictor is not None and (source is None or _with_predictor(source, found).digest != known):
        parts.append("a Budget Predictor")
    if found.drafts and (source is None or with_drafts(source, found.drafts, found.draft_vocabulary).digest != known):
        parts.append("draft exits")
    return parts


def _with_predictor(artifact: Artifact, other: Artifact) -> Artifact:
    config = artifact.config.model_copy(update={"predictor": other.config.predictor})
    return replace(artifact, config=config, predictor=other.predictor)


def _not_of_a_run(out: Path) -> list[str]:
    """Names in `out`, which holds no artifact, that a run would overwrite, or all of them where no run has begun."""
    names = _names(out)
    own = [name for name in names if any(fnmatch(name, pattern) for pattern in _OF_A_RUN)]
    if LOG_FILE in names and _is_log(out / LOG_FILE):
        own.append(LOG_FILE)
    return [name for name in names if name not in own and (not own or name in _WRITTEN_LAST)]


def _is_log(path: Path) -> bool:
    """Whether a file is the log of a run, which a run that stopped early leaves alone in its folder."""
    try:
        with path.open() as log:
            row = json.loads(log.readline())
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and "losses" in row


def _names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir()) if out.is_dir() else []


def _refuse(out: Path, names: list[str]) -> None:
    if names:
        raise TrainingError(
            f"{out} holds {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}, which no run has made and which "
            "could be lost; name another `out`, or an empty folder"
        )
