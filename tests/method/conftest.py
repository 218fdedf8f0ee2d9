"""Tiny models shared by the tests of the method."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath

import pytest
import torch
from torch import nn

from tests.tiny_models import FAMILIES, load_model, random_artifact, save_tiny_model
from vllm_buddy.artifact import Artifact


@dataclass(frozen=True)
class Tiny:
    """A random model of one family with a random artifact."""

    folder: FilePath
    model: nn.Module
    artifact: Artifact


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and lose much to waiting for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp(request.param)
    folder = save_tiny_model(root / "model", request.param)
    return Tiny(folder, load_model(folder), random_artifact(root / "artifact", folder))
