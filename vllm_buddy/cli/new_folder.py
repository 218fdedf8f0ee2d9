"""Checks that a command can write to its output folder, and does not overwrite anything there."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from vllm_buddy.errors import BuddyError


def require_new_folder(out: Path, error_type: type[BuddyError]) -> None:
    """Raise an `error_type` unless `out` is an empty folder that can be written to, or can be made.

    If it was not there, it is not there afterwards.
    """
    if os.path.exists(out) and (not out.is_dir() or any(out.iterdir())):
        raise error_type(f"{out} is not an empty folder; name a new one, so that nothing in it is lost")
    made = [folder for folder in (out, *out.parents) if not os.path.exists(folder)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise error_type(f"cannot write to {out}: {error.strerror or error}") from None
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
