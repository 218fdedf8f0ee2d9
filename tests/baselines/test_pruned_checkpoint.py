"""Tests of the pruned checkpoint: it computes what routing along one path computes, and other tools can load it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.harness.tiny_models import FAMILIES, NUM_LAYERS, load_model, random_prompts, save_tiny_model
from vllm_buddy.artifact.fingerprint import identify
from vllm_buddy.baselines import save_pruned_checkpoint
from vllm_buddy.baselines.pruned_checkpoint import INDEX_FILE, pruned_config
from vllm_buddy.errors import BaselineError
from vllm_buddy.method import path_of
from vllm_buddy.method.reference import routed_logits

LAYERS = [0, 2, 3, 6, 7]
# fp32 logits of magnitude 5 after 5 layers; attention sums in another order
LOGIT_TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "tiny", "llama")


@pytest.fixture
def sharded(llama: Path, tmp_path: Path) -> Path:
    """A copy of the model with one file of weights per layer, one for the embedding, one for the rest, and an index."""
    folder = tmp_path / "sharded"
    shutil.copytree(llama, folder)
    (folder / "model.safetensors").unlink()
    parts: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(llama / "model.safetensors", framework="pt") as f:
        for name in f.keys():  # noqa: SIM118 - safe_open cannot be iterated
            words = name.split(".")
            part = words[2] if words[1] == "layers" else words[1] if words[1] == "embed_tokens" else "rest"
            parts.setdefault(part, {})[name] = f.get_tensor(name)
    files = {part: f"model-{n:05}-of-{len(parts):05}.safetensors" for n, part in enumerate(sorted(parts), start=1)}
    for part, tensors in parts.items():
        save_file(tensors, folder / files[part], metadata={"format": "pt"})
    weight_map = {name: files[part] for part, tensors in parts.items() for name in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _check(model_dir: Path, checkpoint: Path, layers: list[int]) -> None:
    """Check that Hugging Face's forward on the checkpoint equals the routed forward on the whole model."""
    prompt = random_prompts(1, seed=4, min_tokens=20)[0]
    expected = routed_logits(load_model(model_dir), prompt, [path_of(layers)] * len(prompt), "masked")
    pruned = load_model(checkpoint)
    assert len(pruned.model.layers) == len(layers)
    with torch.no_grad():
        found = pruned(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGIT_TOLERANCE)
    full = load_model(model_dir)(torch.tensor([prompt])).logits[0]
    assert (found - full).abs().max() > 100 * LOGIT_TOLERANCE  # otherwise a missing layer could go unnoticed


def test_checkpoint_computes_what_routing_along_the_path_does(folder: Path, tmp_path: Path) -> None:
    """Fails if layers are renumbered wrongly, or a tensor, a bias or a norm comes from another layer."""
    out = save_pruned_checkpoint(folder, [7, 3, 0, 2, 6], tmp_path / "out")
    _check(folder, out, LAYERS)
    assert identify(out).num_layers == len(LAYERS)
    assert not (out / INDEX_FILE).exists()


def test_shards_stay_shards(sharded: Path, llama: Path, tmp_path: Path) -> None:
    """Fails if the shards are merged, which takes as much memory as the model, or the index is wrong."""
    out = save_pruned_checkpoint(sharded, LAYERS, tmp_path / "out")
    _check(llama, out, LAYERS)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    num_shards = len(LAYERS) + 2  # the shards of removed layers are not written
    assert files == [f"model-{n:05}-of-{num_shards:05}.safetensors" for n in range(1, num_shards + 1)]
    index = json.loads((out / INDEX_FILE).read_text())
    found = {}
    for file in files:
        with safe_open(out / file, framework="pt") as f:
            found |= {name: (file, f.get_tensor(name).nbytes) for name in f.keys()}  # noqa: SIM118
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(size for _, size in found.values())


def test_a_file_that_the_index_does_not_name_is_not_read(sharded: Path, llama: Path, tmp_path: Path) -> None:
    """Fails if a file that repeats the weights under other names (`consolidated.safetensors`) is also copied."""
    save_file({"layers.0.attention.wq.weight": torch.zeros(1)}, sharded / "consolidated.safetensors")
    out = save_pruned_checkpoint(sharded, LAYERS, tmp_path / "out")
    assert "layers.0.attention.wq.weight" not in json.loads((out / INDEX_FILE).read_text())["weight_map"]
    _check(llama, out, LAYERS)


def test_what_is_copied(llama: Path, tmp_path: Path) -> None:
    """Fails if weights of another format are copied, a read-only file stops the run, or the tokenizer is missing."""
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    for name in ("pytorch_model.bin", "model.gguf", "vllm_buddy_source.json", "tokenizer.json", "LICENSE"):
        (model / name).write_text(name)
    for path in model.iterdir():
        path.chmod(0o444)
    out = save_pruned_checkpoint(model, LAYERS, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        "LICENSE", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert (out / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_what_the_configuration_says_of_single_layers() -> None:
    """Fails if a kept layer gets the attention type of the layer that had its new number."""
    kinds = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    config = {"num_hidden_layers": 4, "layer_types": kinds, "max_window_layers": 2, "hidden_size": 8}
    assert pruned_config(config, [0, 2, 3]) == {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "max_window_layers": 1,
        "hidden_size": 8,
    }
    assert pruned_config({"num_hidden_layers": 4, "layer_types": None}, [0, 3]) == {
        "num_hidden_layers": 2,
        "layer_types": None,
    }


@pytest.mark.parametrize("layers", [[], [0, NUM_LAYERS], [-1, 0]])
def test_layers_that_the_model_does_not_have(llama: Path, tmp_path: Path, layers: list[int]) -> None:
    """Fails if a checkpoint is written although the model does not have all of the layers."""
    with pytest.raises(BaselineError, match=r"are not layers of a model with 8"):
        save_pruned_checkpoint(llama, layers, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_pruned_leave_nothing_behind(sharded: Path, tmp_path: Path) -> None:
    """Fails if a damaged, incomplete or quantised model is pruned, or leaves files behind."""
    (gone,) = sharded.glob("model-00003-*")
    kept = gone.read_bytes()
    gone.write_bytes(kept[:100])
    with pytest.raises(BaselineError, match="is not a complete safetensors file"):
        save_pruned_checkpoint(sharded, LAYERS, tmp_path / "out")
    gone.unlink()
    with pytest.raises(BaselineError, match=r"model-00003-of-00010.safetensors is not a complete safetensors file"):
        save_pruned_checkpoint(sharded, LAYERS, tmp_path / "out")
    gone.write_bytes(kept)
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(BaselineError, match="is quantised; prune the model it was made from"):
        save_pruned_checkpoint(sharded, LAYERS, tmp_path / "out")
    (sharded / "config.json").write_text("{")
    with pytest.raises(BaselineError, match=r"config.json cannot be read"):
        save_pruned_checkpoint(sharded, LAYERS, tmp_path / "out")
    (sharded / "config.json").write_text(json.dumps(config))
    for path in sharded.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(BaselineError, match="holds no safetensors"):
        save_pruned_checkpoint(sharded, LAYERS, tmp_path / "out")
    assert not (tmp_path / "out").exists()
