"""Which artifact a server takes, and which it refuses for its model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.engine import Tiny
from tests.harness.server_config import configure, refusal
from tests.harness.tiny_models import (
    random_artifact,
    save_tiny_model,
)
from vllm_buddy.artifact import CONFIG_FILE, WEIGHTS_FILE, Artifact
from vllm_buddy.artifact.config import FORMAT_VERSION
from vllm_buddy.errors import ArtifactError
from vllm_buddy.serving.start.base_model import check_base_model, identify_served_model


def test_without_an_artifact_the_ways_to_get_one_are_told(llama_model: Tiny) -> None:
    """Fails if a model without a shipped artifact is served unrouted, or the user is left alone."""
    message = refusal(llama_model, additional_config={})
    assert "vllm-buddy prior" in message
    assert "LlamaForCausalLM, 8 layers" in message


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "nobody/nothing", "noname"])
def test_an_artifact_that_is_not_there_is_refused_by_name(
    llama_model: Tiny, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a wrong name starts a server with another artifact, or none."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert name in refusal(llama_model, {"artifact": name})


def damage_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **changes}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights truncated": (
        lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:-100]),
        "not a complete safetensors file",
    ),
    "weights empty": (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), WEIGHTS_FILE),
    "weights missing": (lambda f: (f / WEIGHTS_FILE).unlink(), WEIGHTS_FILE),
    "config truncated": (
        lambda f: (f / CONFIG_FILE).write_text((f / CONFIG_FILE).read_text()[:-30]),
        "is not JSON",
    ),
    "config missing": (lambda f: (f / CONFIG_FILE).unlink(), CONFIG_FILE),
    "config of another kind": (lambda f: (f / CONFIG_FILE).write_text("[1]"), CONFIG_FILE),
    "newer format": (lambda f: damage_config(f, format_version=FORMAT_VERSION + 1), "update vllm_buddy"),
    "unknown field": (lambda f: damage_config(f, surprise=1), "surprise"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_artifact_is_refused(llama_model: Tiny, artifact_copy: Path, name: str) -> None:
    """Fails if half an artifact routes half a model."""
    damage, told = DAMAGE[name]
    damage(artifact_copy)
    message = refusal(llama_model, {"artifact": str(artifact_copy)})
    assert told in message
    assert str(artifact_copy) in message


@pytest.mark.parametrize("other", ["family", "weights"])
def test_an_artifact_of_another_model_is_refused_with_both_named(
    llama_model: Tiny, tmp_path: Path, tiny: Callable[[str], Tiny], other: str
) -> None:
    """Fails if a router trained for one model routes another, even one of the same shape."""
    if other == "family":
        artifact = tiny("qwen2").artifact_folder
    else:
        model = save_tiny_model(tmp_path / "other", "llama", seed=1)
        random_artifact(tmp_path / "artifact", model)
        artifact = tmp_path / "artifact"
    message = refusal(llama_model, {"artifact": str(artifact)})
    assert "was made for" in message
    assert message.count("fingerprint") == 2


def quantised_copy(folder: Path, tiny: Tiny) -> Path:
    """A copy of a model whose quantiser has scaled a norm."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny.folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_copy_with_other_norms_is_served_if_the_shape_is_to_decide(llama_model: Tiny, tmp_path: Path) -> None:
    """Fails if a copy that AWQ has made cannot be served at all, or one of another shape can."""
    copy = quantised_copy(tmp_path / "copy", llama_model)
    assert "was made for" in refusal(llama_model, model=str(copy))
    configure(llama_model, {"base_check": "shape"}, model=str(copy))
    other = save_tiny_model(tmp_path / "other", "qwen3")
    assert "was made for" in refusal(llama_model, {"base_check": "shape"}, model=str(other))


def test_who_serves_a_quantised_copy_is_told_of_the_setting(
    llama_model: Tiny, tmp_path: Path, tiny: Callable[[str], Tiny]
) -> None:
    """Fails if a user of AWQ is not told of base_check, or it is advised for a model that only looks alike."""
    config = configure(llama_model)
    config.model_config.model = str(quantised_copy(tmp_path / "copy", llama_model))

    def told(artifact: Artifact, quantization: str | None) -> str:
        config.model_config.quantization = quantization
        with pytest.raises(ArtifactError) as caught:
            check_base_model(artifact, config)
        return str(caught.value)

    hint = 'whose quantiser (awq) scaled the norms, as those of AWQ and SmoothQuant do, set "base_check": "shape"'
    assert hint in told(llama_model.artifact, "awq")
    assert "base_check" not in told(llama_model.artifact, None)
    assert "base_check" not in told(tiny("qwen2").artifact, "awq")


def test_a_model_without_weights_takes_an_artifact_of_its_shape(llama_model: Tiny, tmp_path: Path) -> None:
    """Fails if benchmarks on random weights need a checkpoint, or are routed by an artifact of another shape."""

    def without_weights(folder: Path) -> dict[str, Any]:
        copy = shutil.copytree(
            folder, tmp_path / "dummies" / folder.name, ignore=shutil.ignore_patterns("*.safetensors")
        )
        return {"model": str(copy), "load_format": "dummy"}

    configure(llama_model, **without_weights(llama_model.folder))
    changes: tuple[dict[str, Any], ...] = ({"hidden_size": 64}, {"vocab_size": 256}, {"num_hidden_layers": 6})
    for number, change in enumerate(changes):
        other = save_tiny_model(tmp_path / f"other{number}", "llama", **change)
        random_artifact(tmp_path / f"artifact{number}", other)
        dummy = without_weights(other)
        configure(llama_model, {"artifact": str(tmp_path / f"artifact{number}")}, **dummy)
        assert "was made for" in refusal(llama_model, **dummy)


def test_a_hub_model_is_identified_in_the_folder_that_vllm_downloads_to(
    llama_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if config.json is not asked for: vLLM downloads what the first pattern that matches stands for."""
    from vllm.model_executor.model_loader import weight_utils

    asked: list[Any] = []

    def download(name: str, cache_dir: str | None, patterns: list[str], revision: str | None) -> str:
        asked.append((name, cache_dir, patterns, revision))
        return str(llama_model.folder)

    monkeypatch.setattr(weight_utils, "download_weights_from_hf", download)
    config = configure(llama_model)
    config.model_config.model, config.load_config.download_dir = "owner/name", "elsewhere"
    found = identify_served_model(config)
    assert found.fingerprint == llama_model.artifact.config.base_model.fingerprint
    assert [call[2] for call in asked] == [["*.safetensors"], ["config.json"]]
    assert {call[:2] for call in asked} == {("owner/name", "elsewhere")}


def test_a_model_cut_by_overrides_is_refused(llama_model: Tiny) -> None:
    """Fails if the artifact fits the files and not the model: paths would lose layers, the last one first."""
    assert "6 layers" in refusal(llama_model, hf_overrides={"num_hidden_layers": 6})


AUTO_ALONE: tuple[dict[str, Any], ...] = (
    {"default_budget": "auto"},
    {"auto": {"min": 0.5}},
    {"auto": {"max": 0.9}},
    {"auto": {"price": 0.1}},
    {"load": {"price": 0.1}},
    {"load": {"price": 0.1, "waiting": [1, 8]}},
    {"slo": {"itl_ms": 50}},
    {"default_budget": "auto", "auto": {"price": 0.0}},
)


@pytest.mark.parametrize("buddy", AUTO_ALONE, ids=str)
def test_auto_without_a_budget_predictor_is_refused_with_the_ways_out(
    llama_model: Tiny, without_predictor: str, buddy: dict[str, Any]
) -> None:
    """Fails if a server whose operator counts on "auto" starts with something else."""
    message = refusal(llama_model, {"artifact": without_predictor, **buddy})
    assert "artifact 'plain' has no Budget Predictor" in message
    assert "`vllm-buddy train-budget`" in message
    assert ("set default_budget to a number in (0, 1]" in message) == ("default_budget" in buddy)
    assert all(name in message for name in buddy)


def test_an_artifact_without_a_budget_predictor_is_served(llama_model: Tiny, without_predictor: str) -> None:
    """Fails if the settings of "auto" are in the way of those who do not use it."""
    config = configure(llama_model, {"artifact": without_predictor, "load": None, "auto": {"min": None}})
    assert config.model_config.buddy_limits.auto is None


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_depths_per_token_need_an_artifact_with_nested_paths(
    llama_model: Tiny, without_predictor: str, part: str
) -> None:
    """Fails if a server that cannot choose depths per token starts, and serves one depth in silence."""
    message = refusal(llama_model, {"artifact": without_predictor, "schedule": {part: "token"}})
    assert "no nested paths" in message
    assert '"request"' in message
