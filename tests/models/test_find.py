"""Tests of how a model is named: folder, embedded name or hub id."""

from pathlib import Path
from typing import Any

import pytest

from vllm_buddy.errors import ModelError
from vllm_buddy.models import find
from vllm_buddy.models.find import find_model


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The embedded models that were fetched."""
    names: list[str] = []

    def fetch(name: str, report: Any) -> Path:
        names.append(name)
        return Path("/cache") / name

    monkeypatch.setattr(find, "fetch", fetch)
    return names


def test_folders_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: list[str]) -> None:
    """Fails if a folder with the name of an embedded model is taken for that model."""
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("smollm2-135m") == Path("smollm2-135m")
    assert fetched == []


def test_embedded_models_go_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: list[str]) -> None:
    """Fails if a command takes folders only, or the default is another model."""
    monkeypatch.chdir(tmp_path)
    assert find_model("qwen2.5-coder-0.5b") == Path("/cache/qwen2.5-coder-0.5b")
    assert find_model(None) == Path("/cache/smollm2-135m")


def test_hub_ids_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a hub id is refused where the hub can be reached, or other formats are downloaded with the model."""
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return "/cache/snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert find_model("Qwen/Qwen3-8B") == Path("/cache/snapshot")
    assert asked["name"] == "Qwen/Qwen3-8B"
    assert "*.safetensors" in asked["patterns"]
    assert not any("gguf" in pattern for pattern in asked["patterns"])


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a machine without the hub gets a traceback, or no way out."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="hf download no-such-owner/model --local-dir DIR"):
        find_model("no-such-owner/model")


def test_a_name_that_no_file_system_takes() -> None:
    """Fails if a text in the place of a model ends in a traceback."""
    with pytest.raises(ModelError, match=r"no model at xxx.*\.\.\.: File name too long"):
        find_model("x" * 5000)


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "smollm", "a/b/c"])
def test_what_is_nothing_is_refused(name: str) -> None:
    """Fails if a misspelt folder is looked for on the hub."""
    with pytest.raises(ModelError, match=r"neither a folder nor an embedded model \(smollm2-135m, qwen2.5-coder-0.5b"):
        find_model(name)
