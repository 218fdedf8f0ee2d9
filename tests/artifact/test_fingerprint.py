"""Tests of identifying a base model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.harness.tiny_models import NUM_LAYERS, load_model, save_tiny_model
from vllm_buddy.artifact.fingerprint import identify, model_digest, weight_digest
from vllm_buddy.errors import ArtifactError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "base", "llama")


def _fingerprint(folder: Path) -> str:
    return identify(folder).fingerprint


def test_identity_says_what_the_model_is(folder: Path) -> None:
    """Fails if an identity lacks the name or the shape that error messages about a mismatch show."""
    identity = identify(folder, "someone/tiny")
    assert identity.shape == ("LlamaForCausalLM", NUM_LAYERS, 128, 512)
    assert identity.summary().startswith("someone/tiny (LlamaForCausalLM, 8 layers, hidden 128, vocabulary 512,")
    assert identify(folder).id == "base"


def test_a_model_from_the_hub_has_its_hub_id(folder: Path, tmp_path: Path) -> None:
    """Fails if an artifact of a downloaded model is labelled with a commit hash, or a converted one with a folder."""
    snapshot = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "0a1b2c"
    shutil.copytree(folder, snapshot)
    assert identify(snapshot).id == "Qwen/Qwen3-8B"
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | {"_name_or_path": "someone/else"}))
    assert identify(snapshot).id == "someone/else"


def test_same_for_a_copy_in_bf16_and_in_shards(folder: Path, tmp_path: Path) -> None:
    """Fails if an artifact made from fp32 weights does not fit a bf16 or sharded copy of the model."""
    model = load_model(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    bf16 = save_tiny_model(tmp_path / "bf16", "llama", dtype=torch.bfloat16)
    assert _fingerprint(folder) == _fingerprint(bf16) == _fingerprint(tmp_path / "shards")


def test_differs_for_other_weights(folder: Path, tmp_path: Path) -> None:
    """Fails if a fine-tuned model of the same shape gets the same fingerprint."""
    other = save_tiny_model(tmp_path / "other", "llama", seed=1)
    assert _fingerprint(folder) != _fingerprint(other)
    for name in ("model.layers.5.input_layernorm.weight", "model.norm.weight", "model.embed_tokens.weight"):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name] + 0.05
        changed = tmp_path / name
        changed.mkdir()
        save_file(tensors, changed / "model.safetensors")
        (changed / "config.json").write_text((folder / "config.json").read_text())
        assert _fingerprint(changed) != _fingerprint(folder)


def test_same_where_only_matrices_differ(folder: Path, tmp_path: Path) -> None:
    """Fails if a quantised copy of the base model, in which only matrices differ, gets another fingerprint."""
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("proj.weight"):
            tensors[name] = (tensors[name] * 16).round() / 16
    (tmp_path / "quantised").mkdir()
    save_file(tensors, tmp_path / "quantised" / "model.safetensors")
    (tmp_path / "quantised" / "config.json").write_text((folder / "config.json").read_text())
    assert _fingerprint(tmp_path / "quantised") == _fingerprint(folder)


def test_folders_that_are_no_models(folder: Path, tmp_path: Path) -> None:
    """Fails if a folder without a usable model raises a KeyError or an error of the JSON library."""
    with pytest.raises(ArtifactError, match=r"holds no config\.json, so it is not a Hugging Face model folder"):
        identify(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"architectures": ["CLIPModel"]}))
    with pytest.raises(ArtifactError, match="has no 'num_hidden_layers', so it is not that of a decoder"):
        identify(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ArtifactError, match=r"(?s)config\.json cannot be used .*num_layers"):
        identify(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ArtifactError, match=r"config\.json is not an object"):
        identify(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": None}))
    with pytest.raises(ArtifactError, match=r"(?s)config\.json cannot be used .*num_layers"):
        identify(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"config\.json cannot be used"):
        identify(folder)


def test_weights_that_are_missing_or_cut_short(folder: Path) -> None:
    """Fails if a model with missing or truncated weights gets a fingerprint."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"is not a complete safetensors file .* get the model again"):
        identify(folder)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"cannot take a weight fingerprint, no tensor 'model\.layers\.0\.input"):
        identify(folder)


def test_the_digest_of_weights_tells_a_fine_tuned_model_from_its_base(folder: Path, tmp_path: Path) -> None:
    """Fails if a model whose matrices were changed by a merged LoRA finds what was computed with its base."""
    model = load_model(folder)
    loaded, stored = model_digest(model), weight_digest(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    assert weight_digest(tmp_path / "shards") == stored
    with torch.no_grad():
        projection = model.model.layers[5].mlp.down_proj.weight
        projection += 1e-3 * torch.randn(len(projection), 1) @ torch.randn(1, projection.shape[1])
    model.save_pretrained(tmp_path / "merged")
    assert _fingerprint(tmp_path / "merged") == _fingerprint(folder)
    assert weight_digest(tmp_path / "merged") != stored
    assert model_digest(model) != loaded
    assert model_digest(load_model(folder).bfloat16()) != loaded
