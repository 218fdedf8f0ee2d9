"""The command `vllm-buddy artifacts`."""

from pathlib import Path

import pytest

from tests.harness.tiny_models import random_artifact, save_tiny_model
from vllm_buddy.cli import artifacts, main


def test_the_list_tells_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if an artifact that changes the base weights looks like one that only routes."""
    model = save_tiny_model(tmp_path / "model", "llama")
    parts = {
        "plain": {"decision": False},
        "repaired": {"bypass_rank": 4},
        "changed": {"lora_rank": 2},
        "choosing": {"predictor_depths": (4, 6, 8)},
    }
    folders = {name: tmp_path / name for name in parts}
    for name, folder in folders.items():
        random_artifact(folder, model, **parts[name])
    monkeypatch.setattr(artifacts, "shipped_artifacts", lambda: folders)
    assert main(["artifacts"]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert [block.split("\n")[0] for block in blocks] == list(parts)
    trained = [line for block in blocks for line in block.splitlines() if line.startswith("  trained:")]
    assert [line.split(maxsplit=1)[1] for line in trained] == [
        "nothing",
        "bypass of rank 4",
        "LoRA of rank 2, merged",
        "budget auto among 3 depths",
    ]
