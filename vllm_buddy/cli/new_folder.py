"""Checks that a command does not overwrite anything in its output folder."""

from pathlib import Path

from vllm_buddy.errors import BuddyError


def require_new_folder(out: Path, error_type: type[BuddyError]) -> None:
    """Raise an `error_type` unless `out` is an empty folder or does not exist."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise error_type(f"{out} is not an empty folder; name a new one, so that nothing in it is lost")
