"""The full model's logits on disk: there must be room for them, and they are computed once."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.conftest import run
from vllm_buddy.errors import TrainingError


def test_no_room_for_the_logits_is_found_before_training(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a full disk is noticed only by a write to the mapped file, which kills the process without a message."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(TrainingError, match=r"logits need .* MiB .* cache_dir"):
        run(settings)


def test_a_second_run_finds_the_logits_of_the_first(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a second run computes the full model's logits again."""
    from vllm_buddy.training.teacher import Teacher

    computed: list[int] = []
    compute = Teacher._compute

    def counted(self: Teacher, token_ids: torch.Tensor) -> Any:
        computed.append(len(token_ids))
        return compute(self, token_ids)

    monkeypatch.setattr(Teacher, "_compute", counted)
    cache, usage = {"cache_dir": tmp_path / "cache"}, shutil.disk_usage("/")
    _, stage, losses = run(settings | cache)
    assert sum(computed) == len(np.unique(stage.corpus.order))
    computed.clear()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))  # which is enough now
    assert run(settings | cache | {"out": tmp_path / "again"})[2] == losses
    assert computed == []
