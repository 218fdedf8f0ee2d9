"""Writes and reads checkpoints; a checkpoint on disk is replaced as a whole or not at all."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from vllm_buddy.errors import TrainingError

CHECKPOINT_FILE = "checkpoint.pt"
START_FILE = "start.pt"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`. If the process is killed or the disk fills up, the previous file stays intact.

    Raises:
        TrainingError: the disk is full or the folder cannot be written.
    """
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for an incomplete write
        partial.unlink(missing_ok=True)
        kept = "the one before it is intact" if path.is_file() else "there is none before it"
        raise TrainingError(f"cannot write {path}: {error}; {kept}. Make room and run the same command again") from None


def load_state(path: Path) -> dict[str, Any]:
    """Return the state that `save_state` wrote.

    Raises:
        TrainingError: the file is not a checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); remove it to start again") from None
