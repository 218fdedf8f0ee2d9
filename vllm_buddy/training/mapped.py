"""Arrays in files, which several processes may create and fill at once."""

import contextlib
import os
from pathlib import Path

import numpy as np


def open_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Map the array in `path`, created as zeros if it is missing. The file is sparse: only written parts take space.

    An array of fewer rows gets more, one of more rows keeps them.
    """
    if path.is_file() and (rows := len(kept := np.load(path, mmap_mode="r"))) < shape[0]:
        longer = path.with_name(f"{path.name}.{os.getpid()}")
        np.lib.format.open_memmap(longer, mode="w+", dtype=dtype, shape=shape)[:rows] = kept
        os.replace(longer, path)
    if not path.is_file():
        own = path.with_name(f"{path.name}.{os.getpid()}")
        np.lib.format.open_memmap(own, mode="w+", dtype=dtype, shape=shape)
        with contextlib.suppress(FileExistsError):  # another process created it first
            os.link(own, path)
        own.unlink()
    return np.lib.format.open_memmap(path, mode="r+")
