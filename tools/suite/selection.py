"""Which of vLLM's tests are run, in which modes, and why others are left out: reads selection.toml."""

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tools.suite.environment import MODES, STOCK

PATH = Path(__file__).with_name("selection.toml")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Remark(_Strict):
    """A reason that holds for some tests of a file. test: the beginning of what follows `file.py::`."""

    test: str = Field(min_length=1)
    reason: str = Field(min_length=10)

    def covers(self, test: str) -> bool:
        """Whether it holds for this test."""
        return test.startswith(self.test)


class TestFile(_Strict):
    """One file of vLLM's tests.

    path: below tests/. engine: whether any of its tests starts an engine or a server; if not, budgets mean nothing.
    imported_as_cuda: whether it skips itself without CUDA when it is imported, although nothing in it needs CUDA.
    needs_weights: whether it compares outputs with those of the full model, so that only budget 1.0 makes sense.
    deselected: tests that are not run. differences: tests that pass with stock vLLM and rightly do not here.
    """

    __test__ = False  # pytest would take the class for a test

    path: str
    engine: bool = False
    imported_as_cuda: bool = False
    needs_weights: bool = False
    deselected: tuple[Remark, ...] = ()
    differences: tuple[Remark, ...] = ()

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes in which the file is run."""
        return MODES if self.engine and not self.needs_weights else (STOCK, "1.0")

    def why_different(self, test: str) -> str | None:
        """Why this test does not pass here although it does with stock vLLM; None if nobody said."""
        return next((remark.reason for remark in self.differences if remark.covers(test)), None)


class Selection(_Strict):
    """The whole selection. adapters: names of models in the tests that are LoRA adapters."""

    vllm: str
    adapters: tuple[str, ...]
    files: tuple[TestFile, ...]


def load() -> Selection:
    """Read selection.toml."""
    data: dict[str, Any] = tomllib.loads(PATH.read_text())
    return Selection(**data)
