"""Tests the shapes of real models, the artifact made for them, and weights that tell layers apart."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.drawn_weights import draw_weights
from benchmarks.gpu.model_shapes import LLAMA_8B, MODEL_SHAPES, QWEN_7B, ModelShape, evenly_spaced
from vllm_buddy.artifact import load_artifact
from vllm_buddy.method import Router, layers_of

PARAMETERS = {"Llama-3.1-8B": 8_030_261_248, "Qwen2.5-7B-Instruct": 7_615_616_512}  # as their model cards count them
KV_BYTES_PER_TOKEN = {"Llama-3.1-8B": 131072, "Qwen2.5-7B-Instruct": 57344}


@pytest.mark.parametrize("shape", MODEL_SHAPES.values(), ids=lambda shape: shape.name)
def test_a_shape_has_the_size_of_its_model(shape: ModelShape, tmp_path: Path) -> None:
    """Fails if a step reads more or less weights or KV cache than the model of that name."""
    config = AutoConfig.from_pretrained(shape.save(tmp_path / "model"))
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[shape.name]
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * 2
    assert per_token == KV_BYTES_PER_TOKEN[shape.name]


def test_positions_are_those_of_the_models(tmp_path: Path) -> None:
    """Fails if transformers does not understand the rotary embeddings in config.json and uses its defaults."""
    llama = AutoConfig.from_pretrained(LLAMA_8B.save(tmp_path / "llama"))
    assert llama.rope_parameters["rope_theta"] == 500000.0
    assert llama.rope_parameters["rope_type"] == "llama3"
    assert llama.max_position_embeddings == 131072
    qwen = AutoConfig.from_pretrained(QWEN_7B.save(tmp_path / "qwen"))
    assert qwen.rope_parameters["rope_theta"] == 1e6
    assert qwen.sliding_window is None


def test_a_model_with_fewer_layers_differs_in_nothing_else(tmp_path: Path) -> None:
    """Fails if the peer of a budget is another model."""
    whole = json.loads((LLAMA_8B.save(tmp_path / "whole") / "config.json").read_text())
    pruned = json.loads((LLAMA_8B.save(tmp_path / "pruned", 16) / "config.json").read_text())
    assert pruned.pop("num_hidden_layers") == 16
    assert whole.pop("num_hidden_layers") == 32
    assert pruned == whole


@pytest.mark.parametrize("depth", [24, 16, 8])
def test_the_prior_keeps_evenly_spaced_layers(depth: int) -> None:
    """Fails if a path is one block of layers: its layers would not show what skipping between them does."""
    layers = np.array(layers_of(Router(32, evenly_spaced(30)).path(None, depth)))
    assert len(layers) == depth
    assert layers[0] == 0
    assert layers[-1] == 31
    assert np.diff(layers).max() <= 2 * 32 / depth


def test_the_artifact_is_one_that_loads(tmp_path: Path) -> None:
    """Fails if serving refuses the artifact, or has no bypass to run."""
    small = ModelShape("small", {**LLAMA_8B.config, "num_hidden_layers": 6, "hidden_size": 64, "vocab_size": 100})
    small.artifact(bypass_rank=8).save(tmp_path)
    artifact = load_artifact(tmp_path)
    assert artifact.bypass is not None
    assert artifact.bypass.rank == 8
    assert artifact.bypass.eps == 1e-5
    assert artifact.config.base_model.shape == ("LlamaForCausalLM", 6, 64, 100)


def tiny_model(num_layers: int) -> nn.Module:
    torch.manual_seed(num_layers)
    config = LlamaConfig(
        num_hidden_layers=num_layers, hidden_size=64, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=128, vocab_size=200,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_some_layers_of_a_model_have_its_weights() -> None:
    """Fails if the pruned peer has other weights than the layers of buddy's path, so outputs cannot be compared."""
    whole, pruned = tiny_model(5), tiny_model(3)
    draw_weights(whole, range(5))
    draw_weights(pruned, [0, 3, 4])
    for index, layer in enumerate((0, 3, 4)):
        ours = pruned.model.layers[index].state_dict()  # type: ignore[union-attr, index]
        for name, weight in whole.model.layers[layer].state_dict().items():  # type: ignore[union-attr, index]
            assert torch.equal(ours[name], weight), name
    assert torch.equal(pruned.lm_head.weight, whole.lm_head.weight)  # type: ignore[union-attr, arg-type]


def test_each_layer_changes_the_logits() -> None:
    """Fails if an engine could run the wrong layers and give the right tokens, as with vLLM's dummy weights."""
    model = tiny_model(5)
    draw_weights(model, range(5))
    model = model.bfloat16()
    layers, token_ids = list(model.model.layers), torch.arange(100, 120)[None]  # type: ignore[union-attr, arg-type]

    def logits(keep: list[int]) -> torch.Tensor:
        model.model.layers = nn.ModuleList([layers[i] for i in keep])  # type: ignore[union-attr]
        with torch.no_grad():
            return model(token_ids, use_cache=False).logits[0, -1].float()

    whole = logits([0, 1, 2, 3, 4])
    for left_out in range(5):
        others = logits([i for i in range(5) if i != left_out])
        assert (others - whole).abs().mean() > 0.5, left_out  # of logits with a standard deviation of about 4
    assert 2 < whole.std() < 8
