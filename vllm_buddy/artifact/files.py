"""Reads and writes the files of an artifact.

They may come from anyone: nothing in them is executed, and how much is read is bounded.
Links are followed, because the cache of the Hugging Face hub is made of them; what they lead to must be a file of the
same kind.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from vllm_buddy.errors import ArtifactError, cut, shown

MOST_CONFIG_BYTES = 16 << 20  # a library of thousands of paths takes some hundred kilobytes
MOST_WEIGHTS_BYTES = 4 << 30  # in memory, as float32; the bypasses of an 8-billion-parameter model take 0.1 GiB

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "I8": np.dtype(np.int8)}


_MOST_PROBLEMS = 4  # of a configuration that a message names


class TensorHeader(NamedTuple):
    """Type and shape of a tensor that has not been read."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ArtifactError: it is missing, unreadable, too large or not JSON.
    """
    try:
        if not path.is_file():
            raise ArtifactError(f"no artifact at {path.parent}: {path.name} is missing")
        with path.open("rb") as file:
            data = file.read(MOST_CONFIG_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror})") from None
    if len(data) > MOST_CONFIG_BYTES:
        raise ArtifactError(f"{path} has more than {MOST_CONFIG_BYTES >> 20} MiB, which no configuration has")
    try:
        return json.loads(data.decode())
    except RecursionError:
        raise ArtifactError(f"{path} is not JSON that can be read (it is nested too deeply)") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON ({one_line(error)})") from None


class TensorFile:
    """A safetensors file whose headers are known, and whose tensors are read when they have been checked.

    Raises:
        ArtifactError: it is missing, unreadable or incomplete, holds a tensor of another type than the format has, or
            would take more memory than any artifact.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            if not path.is_file():
                raise ArtifactError(f"artifact {path.parent} has no {path.name}")
            with safe_open(path, framework="np") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                found = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        except (SafetensorError, OSError, MemoryError) as error:
            raise self._damaged(error) from None
        for name, (dtype, _) in found.items():
            if dtype not in _DTYPES:
                raise ArtifactError(f"{path}: tensor {shown(name)} is {dtype}; allowed are {', '.join(_DTYPES)}")
        self.headers = {name: TensorHeader(_DTYPES[dtype], shape) for name, (dtype, shape) in found.items()}
        check_size((header.shape for header in self.headers.values()), str(path))

    def read(self) -> dict[str, np.ndarray]:
        """All tensors.

        Raises:
            ArtifactError: the file has changed, or there is no memory for them.
        """
        try:
            with safe_open(self._path, framework="np") as file:
                return {name: file.get_tensor(name) for name in self.headers}
        except (SafetensorError, OSError, MemoryError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"{self._path} is not a complete safetensors file ({one_line(error)}); get the artifact again"
        )


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` into `folder`, which is made if it is missing: all of them or, where one cannot be written, none.

    The last one says what the others are. While they are put in place it is not there, so that no folder mixes old and
    new: a process that ends just then leaves none that can be loaded.

    Raises:
        ArtifactError: one cannot be written, for example because the disk is full.
    """
    partial = {name: folder / f".{name}.{os.getpid()}.partial" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            partial[name].write_bytes(data)
        (folder / list(files)[-1]).unlink(missing_ok=True)
        for name, path in partial.items():
            path.replace(folder / name)
    except OSError as error:
        with suppress(OSError):
            for path in partial.values():
                path.unlink(missing_ok=True)
        raise ArtifactError(f"cannot write the artifact to {folder}: {error.strerror}") from None


def check_size(shapes: Iterable[tuple[int, ...]], where: str) -> None:
    """Raise an ArtifactError if tensors of these shapes take more memory than any artifact. where: names them."""
    size = sum(map(math.prod, shapes)) * np.dtype(np.float32).itemsize
    if size > MOST_WEIGHTS_BYTES:
        raise ArtifactError(
            f"{where} would take {size / 2**30:.1f} GiB in memory; an artifact takes at most {MOST_WEIGHTS_BYTES >> 30}"
        )


def one_line(error: Exception) -> str:
    """What an error of another package says, in one line."""
    if isinstance(error, ValidationError):
        errors = error.errors(include_url=False)
        told = [f"{_place(e)}: {cut(e['msg'])} (found {shown(e['input'])})" for e in errors[:_MOST_PROBLEMS]]
        more = [f"and {len(errors) - len(told)} more"] if len(errors) > len(told) else []
        return "; ".join(told + more)
    return cut(str(error) or type(error).__name__)


def _place(error: Any) -> str:
    return shown(".".join(str(part) for part in error["loc"]))[1:-1] or "it"
