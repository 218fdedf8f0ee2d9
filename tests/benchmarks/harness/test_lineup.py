"""The models, artifacts and engines that a benchmark compares."""

import argparse
from pathlib import Path

import pytest

from benchmarks.harness.lineup import open_lineup
from benchmarks.harness.rounds import Refused
from tests.harness.tiny_models import random_artifact, save_tiny_model


def test_another_models_artifact_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    """Fails if --model without --artifact runs into a traceback after minutes of starting engines."""
    model, other = (save_tiny_model(tmp_path / family, family) for family in ("llama", "qwen2"))
    random_artifact(tmp_path / "artifact", other)
    args = argparse.Namespace(model=model, artifact=tmp_path / "artifact")
    with pytest.raises(Refused, match=r"name the model's own with --artifact"), open_lineup(args):
        pass
