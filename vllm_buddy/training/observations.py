"""What each token cost in training: the depth it ran, and its divergence from the full model there.

A training step measures this anyway. It is what the router of schedule `token` has to predict, on the mixtures of
depths that it makes itself, and of far more tokens than a measurement of its own could afford.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_buddy.errors import TrainingError
from vllm_buddy.training.mapped import open_array

_FILES = ("observed_sequences.npy", "observed_choices.npy", "observed_divergences.npy")
UNROUTED = -1  # the choice of tokens of a sequence on one path


@dataclass(frozen=True)
class Observations:
    """Arrays on disk, one row per sequence that training runs.

    sequences: [rows], int32, index of the sequence in the corpus. choices: [rows, length], int8, index of each token's
    path, or UNROUTED, also in rows that were not run yet. divergences: [rows, length], float16, nats.
    """

    sequences: np.ndarray
    choices: np.ndarray
    divergences: np.ndarray

    @classmethod
    def open(cls, folder: Path, num_rows: int, length: int, *, fresh: bool = False) -> "Observations":
        """Open the arrays in a folder, or create them.

        fresh: throw away those that are there, of a run that was stopped before its first checkpoint.

        Raises:
            TrainingError: they are those of a run with sequences of another length, or cannot be written.
        """
        try:
            for name in _FILES if fresh else ():
                (folder / name).unlink(missing_ok=True)
            return cls(
                open_array(folder / _FILES[0], np.int32, (num_rows,)),
                open_array(folder / _FILES[1], np.int8, (num_rows, length), UNROUTED),
                open_array(folder / _FILES[2], np.float16, (num_rows, length)),
            )
        except OSError as error:
            raise TrainingError(f"cannot write what training observes to {folder}: {error.strerror or error}") from None

    @classmethod
    def load(cls, file: Path, digest: str) -> "Observations | None":
        """What `save` wrote; None if there is nothing, or it belongs to a run with another digest."""
        if not file.is_file():
            return None
        with np.load(file) as arrays:
            if str(arrays["digest"]) != digest:
                return None
            return cls(arrays["sequences"], arrays["choices"], arrays["divergences"])

    def save(self, file: Path, digest: str) -> None:
        """Write the arrays to one file. digest: of the settings and data that they follow from.

        Raises:
            TrainingError: it cannot be written; a file that is there stays as it is.
        """
        partial = file.with_suffix(f".{os.getpid()}.npz")
        arrays: dict[str, Any] = {name: getattr(self, name) for name in ("sequences", "choices", "divergences")}
        try:
            np.savez(partial, digest=np.array(digest), **arrays)
            os.replace(partial, file)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise TrainingError(f"cannot write {file}: {error.strerror or error}") from None

    def add(self, rows: slice, sequences: np.ndarray, choices: np.ndarray, divergences: torch.Tensor) -> None:
        """Keep what a micro-batch cost, in rows that follow from the step alone."""
        self.sequences[rows], self.choices[rows] = sequences, choices
        self.divergences[rows] = divergences.cpu().numpy().astype(np.float16)

    def routed(self, rows: slice) -> "Observations":
        """Those of `rows` whose tokens had depths of their own, in memory."""
        kept = np.flatnonzero((self.choices[rows] != UNROUTED).all(axis=1)) + rows.start
        return Observations(self.sequences[kept], self.choices[kept], self.divergences[kept])
