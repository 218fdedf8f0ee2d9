"""Tests of the GGUF conversion on a file with the traps of Qwen2.5's: biases, two copies of the embedding, padding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from vllm_buddy.errors import EmbeddedModelError
from vllm_buddy.models.gguf import GgufModel

TEXT = ["a", "b", "c", "Ġ", "ab", "Ġab"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PADDING = ["[PAD0]", "[PAD1]"]
TOKENS = [*TEXT, *CONTROL, "<tool_call>", *PADDING]
MERGES = ["a b", "Ġ ab"]
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        num_hidden_layers=3,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        vocab_size=len(TOKENS),
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.data = parameter.bfloat16().float()  # so that what is written, in bf16, is not rounded
    return model


def write_gguf(path: Path, model: Qwen2ForCausalLM, architecture: str = "qwen2") -> Path:
    """Write the model in llama.cpp's format, the embedding a second time and coarser."""
    writer = GGUFWriter(path, architecture)
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * len(TEXT) + [3] * len(CONTROL) + [4] + [5] * len(PADDING))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(TOKENS.index("<|im_end|>"))
    writer.add_bos_token_id(TOKENS.index("<|endoftext|>"))
    writer.add_pad_token_id(TOKENS.index("<|endoftext|>"))
    writer.add_chat_template("{{ messages[0].content }}")
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if name == "lm_head.weight":
            continue
        if name == "model.embed_tokens.weight":
            writer.add_tensor("output.weight", values)
            coarse = quantize(values, GGMLQuantizationType.Q4_0)
            writer.add_tensor("token_embd.weight", coarse, raw_dtype=GGMLQuantizationType.Q4_0)
        elif name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", values)
        else:
            layer, part = name.removeprefix("model.layers.").split(".", 1)
            part, kind = part.rsplit(".", 1)
            writer.add_tensor(f"blk.{layer}.{_NAMES[part]}.{kind}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf")
    (path / "hf").mkdir()
    GgufModel(write_gguf(path / "tiny.gguf", tiny_qwen2())).write(path / "hf", "tests/tiny")
    return path / "hf"


def test_qwen2_computes_what_the_original_computes(folder: Path) -> None:
    """Fails if biases are lost, Q and K reordered as a Llama's, or the coarser copy of the embedding is read."""
    ids = torch.tensor([[0, 4, 5, 1, 7]])
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(converted(ids).logits, tiny_qwen2()(ids).logits)


def test_qwen2_tokenizer(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fails if padding entries can be typed, control tokens are split, or loading warns of a wrong tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab ab<|im_end|><tool_call>").input_ids == [4, 5, 8, 9]
    assert not set(PADDING) & set(tokenizer.get_vocab())
    assert tokenizer.decode([4, 9, 8], skip_special_tokens=True) == "ab<tool_call>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    assert "regex" not in caplog.text


def test_qwen2_stops_at_both_ends(folder: Path) -> None:
    """Fails if a server that reads generation_config.json runs on after <|endoftext|>."""
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [8, 6]


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    """Fails if a GGUF of a family that was never tried is converted to something that may be wrong."""
    with pytest.raises(EmbeddedModelError, match=r"'gemma'.*can be converted: llama, qwen2"):
        GgufModel(write_gguf(tmp_path / "other.gguf", tiny_qwen2(), "gemma"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    """Fails if a cut or foreign file ends in a traceback."""
    whole = write_gguf(tmp_path / "tiny.gguf", tiny_qwen2()).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.gguf").write_bytes(np.arange(999, dtype=np.uint8).tobytes())
    for name in ("cut.gguf", "noise.gguf"):
        with pytest.raises(EmbeddedModelError, match="not a complete GGUF file"):
            GgufModel(tmp_path / name)
