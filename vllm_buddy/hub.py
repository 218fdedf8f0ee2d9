"""Downloads artifacts and models from the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from vllm_buddy.errors import HubError, cut


def is_hub_id(name: str) -> bool:
    """Whether `name`, of which there is no folder, has the form OWNER/NAME."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def download(name: str, files: Sequence[str]) -> Path:
    """Return the folder of a repository, from the cache or the hub. files: patterns of the files that are wanted.

    Raises:
        HubError: the hub does not give it; one line says why.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub client raises many kinds: offline, missing, forbidden
        raise HubError(cut(str(error) or type(error).__name__)) from None
