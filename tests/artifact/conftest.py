"""A saved artifact with a Decision Module and a path library."""

from pathlib import Path

import pytest

from tests.artifact import parts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parts.artifact(library=parts.LIBRARY).save(tmp_path / "artifact")
    return tmp_path / "artifact"
