"""How a process of the engine tells `vllm-buddy serve` why it refuses to start.

vLLM's processes pass on that a start failed, not why: the reason is in their logs, in a traceback.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_buddy.errors import BuddyError

_VARIABLE = "VLLM_BUDDY_REFUSAL_NOTE"  # vLLM gives its processes the environment


@contextmanager
def refusal_note() -> Iterator[Path]:
    """A place where processes that are started within this leave the first refusal. The file may not be there."""
    before = os.environ.get(_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="vllm-buddy-") as folder:
        note = Path(folder) / "refusal"
        os.environ[_VARIABLE] = str(note)
        try:
            yield note
        finally:
            del os.environ[_VARIABLE]
            if before is not None:
                os.environ[_VARIABLE] = before


@contextmanager
def telling_refusals() -> Iterator[None]:
    """Leave a note of a BuddyError that is raised within this, if somebody started the server who reads it."""
    try:
        yield
    except BuddyError as error:
        if place := os.environ.get(_VARIABLE):
            # Another rank has told it; or this node is not the one of the server, which has a rank that tells it.
            with suppress(FileExistsError, FileNotFoundError), Path(place).open("x") as note:
                note.write(str(error))
        raise
