"""Finds the folder of the model that a user names: a folder, an embedded model or a Hugging Face hub id."""

from collections.abc import Callable
from pathlib import Path

from vllm_buddy.errors import HubError, ModelError, cut
from vllm_buddy.hub import download, is_hub_id
from vllm_buddy.models.embedded import DEFAULT_MODEL, EMBEDDED_MODELS, fetch

# The description of options that name a model.
MODEL_HELP = "folder, name of an embedded model, or hub id of a Hugging Face model"
MODEL_OR_DEFAULT_HELP = f"{MODEL_HELP} (absent: the default embedded model)"

# All that a model folder needs; not the other formats that repositories also hold.
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def find_model(name: Path | str | None, report: Callable[[str], None] = lambda _: None) -> Path:
    """Return the folder of model `name`; None stands for the default embedded model.

    A folder is tried first, then an embedded model's name, then a hub id (OWNER/NAME), which is downloaded.

    report: called with one line of text for each action.

    Raises:
        ModelError: there is no model of that name, or the hub does not give it.
        EmbeddedModelError: an embedded model cannot be written.
    """
    text = DEFAULT_MODEL if name is None else str(name)
    folder = Path(text).expanduser()
    try:
        if name is not None and folder.is_dir():
            return folder
    except OSError as error:
        raise ModelError(f"no model at {cut(text)}: {error.strerror}") from None
    if text in EMBEDDED_MODELS:
        return fetch(text, report=report)
    known = ", ".join(EMBEDDED_MODELS)
    if not is_hub_id(text):
        raise ModelError(f"no model at {cut(text)}: it is neither a folder nor an embedded model ({known})")
    report(f"downloading {text} from the hub, or taking it from its cache")
    try:
        return download(text, _HUB_FILES)
    except HubError as error:
        raise ModelError(
            f"model '{text}' is no folder, no embedded model ({known}), and the hub does not give it: {error}. "
            f"Download it where the hub can be reached (`hf download {text} --local-dir DIR`) and name DIR"
        ) from None
