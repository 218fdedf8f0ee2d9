"""Arrays in files, which several processes may create and fill at once."""

import contextlib
import os
from pathlib import Path

import numpy as np

from vllm_buddy.errors import TrainingError


def open_array(path: Path, dtype: type, shape: tuple[int, ...], fill: int = 0) -> np.ndarray:
    """Map the array in `path`, created full of `fill` if it is missing. Zeros take no space on disk until written.

    An array of fewer rows gets more, which one process may do at a time; one of more rows keeps them.

    Raises:
        TrainingError: the file holds no such array.
    """
    kept = _found(path, dtype, shape) if path.is_file() else None
    if kept is not None and (rows := len(kept)) < shape[0]:
        longer = path.with_name(f"{path.name}.{os.getpid()}")
        _create(longer, dtype, shape, fill)[:rows] = kept
        os.replace(longer, path)
    if not path.is_file():
        own = path.with_name(f"{path.name}.{os.getpid()}")
        _create(own, dtype, shape, fill)
        with contextlib.suppress(FileExistsError):  # another process created it first
            os.link(own, path)
        own.unlink()
    return np.lib.format.open_memmap(path, mode="r+")


def _found(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Map the array in `path` to read it."""
    try:
        kept = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise TrainingError(f"{path} is not an array ({error}); remove it to start again") from None
    if kept.dtype != dtype or kept.shape[1:] != shape[1:]:
        raise TrainingError(
            f"{path} holds rows of {kept.dtype} {list(kept.shape[1:])}, those of this run are {np.dtype(dtype)} "
            f"{list(shape[1:])}; name another `out`, or remove the file"
        )
    return kept


def _create(path: Path, dtype: type, shape: tuple[int, ...], fill: int) -> np.ndarray:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if fill:
        array[:] = fill
    return array
