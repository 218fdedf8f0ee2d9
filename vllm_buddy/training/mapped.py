"""Arrays in files, which several processes may create and fill at once."""

import contextlib
import os
from pathlib import Path

import numpy as np


def open_array(path: Path, dtype: type, shape: tuple[int, ...], fill: int = 0) -> np.ndarray:
    """Map the array in `path`, created full of `fill` if it is missing. Zeros take no space on disk until written.

    An array of fewer rows gets more, which one process may do at a time; one of more rows keeps them.
    """
    if path.is_file() and (rows := len(kept := np.load(path, mmap_mode="r"))) < shape[0]:
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


def _create(path: Path, dtype: type, shape: tuple[int, ...], fill: int) -> np.ndarray:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if fill:
        array[:] = fill
    return array
