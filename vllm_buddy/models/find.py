"""Finds the folder of the model that a user names: a folder, an embedded model or a Hugging Face hub id."""

from collections.abc import Callable
from pathlib import Path

from vllm_buddy.errors import ModelError
from vllm_buddy.models.embedded import DEFAULT_MODEL, EMBEDDED_MODELS, fetch

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
    if name is not None and folder.is_dir():
        return folder
    if text in EMBEDDED_MODELS:
        return fetch(text, report=report)
    known = ", ".join(EMBEDDED_MODELS)
    if folder.is_absolute() or text.startswith(".") or text.count("/") != 1:
        raise ModelError(f"no model at {text}: it is neither a folder nor an embedded model ({known})")
    from huggingface_hub import snapshot_download

    report(f"downloading {text} from the hub, or taking it from its cache")
    try:
        return Path(snapshot_download(text, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub client raises many kinds: offline, missing, forbidden
        raise ModelError(
            f"model '{text}' is no folder, no embedded model ({known}), and the hub does not give it: {error}. "
            f"Download it where the hub can be reached (`hf download {text} --local-dir DIR`) and name DIR"
        ) from None
