"""Fixtures: tiny models that the tests of the method share."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn

from tests.harness.tiny_models import FAMILIES, load_model, random_artifact, save_tiny_model
from vllm_buddy.artifact import Artifact


@dataclass(frozen=True)
class Tiny:
    """A random model of one family with a random artifact."""

    folder: Path
    model: nn.Module
    artifact: Artifact


@pytest.fixture(scope="session", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp(request.param)
    folder = save_tiny_model(root / "model", request.param)
    return Tiny(folder, load_model(folder), random_artifact(root / "artifact", folder))
