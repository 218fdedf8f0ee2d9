"""Finds the folder of the artifact that a user names: a folder, a shipped artifact or a Hugging Face hub id."""

from collections.abc import Callable
from pathlib import Path

from vllm_buddy.artifact.artifact import FILES, load_artifact
from vllm_buddy.artifact.fingerprint import BaseModelIdentity
from vllm_buddy.artifact.shipped import shipped_artifacts
from vllm_buddy.errors import ArtifactError, HubError, cut
from vllm_buddy.hub import download, is_hub_id


def resolve_artifact(name: str | None, base_model: Callable[[], BaseModelIdentity], *, by_token: bool = False) -> Path:
    """Return the folder of artifact `name`; None stands for the shipped artifact that fits the base model.

    A shipped artifact's name is tried first, then a folder, then a hub id (OWNER/NAME), of which the four files of an
    artifact are downloaded. The folder's files are not read for a named artifact.

    base_model: identifies the model that the artifact is for. It is called only where `name` is None, because it may
        download the model.
    by_token: whether the one that is taken without a name has the schedule `token`, if there is such a one.

    Raises:
        ArtifactError: no shipped artifact fits the base model, or there is no artifact of that name.
    """
    shipped = shipped_artifacts()
    if name is None:
        return _shipped_for(base_model(), shipped, by_token)
    if name in shipped:
        return shipped[name]
    folder = Path(name)
    try:
        if folder.is_dir():
            return folder
    except OSError as error:
        raise ArtifactError(f"no artifact at {cut(name)}: {error.strerror}") from None
    known = ", ".join(shipped) or "none"
    if not is_hub_id(name):
        raise ArtifactError(f"no artifact at {cut(name)}: it is neither a folder nor a shipped artifact ({known})")
    try:
        return download(name, FILES)
    except HubError as error:
        raise ArtifactError(
            f"artifact '{cut(name)}' is no folder, no shipped artifact ({known}), and the hub does not give it: {error}"
        ) from None


def _shipped_for(model: BaseModelIdentity, shipped: dict[str, Path], by_token: bool) -> Path:
    found = {folder: load_artifact(folder) for folder in shipped.values()}
    fitting = [folder for folder, artifact in found.items() if artifact.config.base_model.same_model(model)]
    if fitting:
        return next((folder for folder in fitting if (found[folder].token is not None) == by_token), fitting[0])
    alike = [name for name, folder in shipped.items() if found[folder].config.base_model.shape == model.shape]
    raise ArtifactError(
        f"no shipped artifact fits the model {model.summary()}; shipped are: {', '.join(shipped) or 'none'}. "
        'Name one (a server takes it with --additional-config \'{"buddy": {"artifact": FOLDER_OR_HUB_ID}}\'), or make '
        "one: docs/own_model.md has a recipe that takes minutes, and `vllm-buddy prior MODEL OUT --text FILE` "
        f"makes an untrained one{_other_weights(alike)}"
    )


def _other_weights(alike: list[str]) -> str:
    """What to do with shipped artifacts of the model's shape: the hub's weights are not those of the embedded ones."""
    if not alike:
        return ""
    return (
        f". Of the same shape, and made for an embedded model: {', '.join(alike)}. If yours is that model in other "
        f'weights, such as the hub\'s own, a server takes {{"artifact": "{alike[0]}", "base_check": "shape"}}; the '
        "quality of that has not been measured"
    )
