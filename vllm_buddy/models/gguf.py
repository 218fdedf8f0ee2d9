"""Converts a Llama model in a GGUF file to an ordinary Hugging Face folder in bf16.

The GGUF support of transformers is not used, because it needs a full model in memory, drops the digit splitting of this
tokenizer family and changes its interface between versions. The tensors written here are bit-equal to its own.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from vllm_buddy.errors import EmbeddedModelError

_TOP_LEVEL = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of tokens that never result from text
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class GgufLlama:
    """A GGUF file of a Llama model with a byte-level BPE tokenizer and tied embeddings.

    Raises:
        EmbeddedModelError: the package gguf is missing, or the file holds another architecture or tokenizer.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise EmbeddedModelError(
                "reading a GGUF file needs the package gguf, which is not installed; pip install gguf"
            ) from None
        self._reader = GGUFReader(path)
        kind = (self._field("general.architecture"), self._field("tokenizer.ggml.model"))
        if kind != ("llama", "gpt2"):
            raise EmbeddedModelError(f"{path} holds architecture and tokenizer {kind}, expected ('llama', 'gpt2')")

    def write(self, folder: Path, name: str) -> None:
        """Write configuration, weights and tokenizer to `folder`. name: the model's hub id, stored in config.json."""
        tensors = dict(self.tensors())
        weights = folder / "model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod(0o644)  # safetensors makes a file that only its owner can read
        _write_json(folder / "config.json", self._config(name))
        special = {f"{key}_token_id": self._special_id(key) for key in ("bos", "eos", "pad")}
        _write_json(folder / "generation_config.json", special)
        self._write_tokenizer(folder)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and values in the form of transformers' Llama, in bf16."""
        from gguf import dequantize

        for tensor in self._reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type)
            if ".attn_q." in tensor.name:
                values = _undo_rope_order(values, self._field("llama.attention.head_count"))
            elif ".attn_k." in tensor.name:
                values = _undo_rope_order(values, self._field("llama.attention.head_count_kv"))
            yield _hugging_face_name(tensor.name), torch.from_numpy(np.array(values, np.float32)).to(torch.bfloat16)

    def _config(self, name: str) -> dict[str, Any]:
        num_heads = self._field("llama.attention.head_count")
        return {
            "_name_or_path": name,
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self._field("llama.block_count"),
            "hidden_size": self._field("llama.embedding_length"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._field("llama.attention.head_count_kv"),
            "head_dim": self._field("llama.embedding_length") // num_heads,
            "vocab_size": self._field("llama.vocab_size"),
            "max_position_embeddings": self._field("llama.context_length"),
            "rope_theta": self._field("llama.rope.freq_base"),
            # GGUF stores a float32; its shortest decimal form is the number in the original configuration.
            "rms_norm_eps": float(str(np.float32(self._field("llama.attention.layer_norm_rms_epsilon")))),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": self._special_id("bos"),
            "eos_token_id": self._special_id("eos"),
            "pad_token_id": self._special_id("pad"),
            "dtype": "bfloat16",
        }

    def _write_tokenizer(self, folder: Path) -> None:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        splits_digits = self._field("tokenizer.ggml.pre") == "smollm"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if splits_digits else byte_level
        tokenizer.decoder = decoders.ByteLevel()
        types = self._field("tokenizer.ggml.token_type")
        control = [t for t, kind in zip(tokens, types) if kind == _CONTROL_TOKEN]
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(self._field("tokenizer.chat_template"))
        named = {f"{key}_token": tokens[self._special_id(key)] for key in ("bos", "eos", "pad", "unk")}
        _write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": self._field("llama.context_length"),
                "clean_up_tokenization_spaces": False,
                **named,
            },
        )

    def _special_id(self, key: str) -> int:
        long_names = {"pad": "padding", "unk": "unknown"}
        return int(self._field(f"tokenizer.ggml.{long_names.get(key, key)}_token_id"))

    def _field(self, name: str) -> Any:
        field = self._reader.get_field(name)
        if field is None:
            raise EmbeddedModelError(f"the GGUF file has no field {name}")
        return field.contents()


def _hugging_face_name(name: str) -> str:
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name]
    prefix, layer, part, _ = name.split(".")
    if prefix != "blk" or part not in _PER_LAYER:
        raise EmbeddedModelError(f"the GGUF file holds a tensor {name}, which a Llama with tied embeddings has not")
    return f"model.layers.{layer}.{_PER_LAYER[part]}.weight"


def _undo_rope_order(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of each head for transformers' rotary embedding.

    GGUF stores the two rows of each rotated pair side by side; transformers stores all first rows, then all second
    rows. values: [rows, columns].
    """
    pairs = values.shape[0] // num_heads // 2
    return values.reshape(num_heads, pairs, 2, -1).swapaxes(1, 2).reshape(values.shape)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
