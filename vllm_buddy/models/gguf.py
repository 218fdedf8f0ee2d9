"""Converts a Llama or Qwen2 model in a GGUF file to an ordinary Hugging Face folder in bf16.

The GGUF support of transformers is not used. It drops the digit splitting of SmolLM2's tokenizer, keeps padding entries
in Qwen's vocabulary, takes the coarser one of the two copies of a tied embedding and changes its interface between
versions. The other tensors written here are bit-equal to its own.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from transformers import __version__

from vllm_buddy.errors import EmbeddedModelError

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_TOP_LEVEL = {_EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
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
# Values of tokenizer.ggml.token_type.
_CONTROL_TOKEN = 3  # never results from text
_ADDED_TOKEN = 4  # found in text before it is split, such as <tool_call>
_PADDING_TOKEN = 5  # fills the vocabulary up to the rows of the embedding
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class _Family:
    """What differs between architectures.

    interleaved: the file stores the two rows of each rotated pair side by side. stops: further tokens that end a text.
    """

    causal_lm: str
    interleaved: bool
    config: dict[str, Any]
    stops: tuple[str, ...] = ()


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", interleaved=True, config={"attention_bias": False, "mlp_bias": False}),
    "qwen2": _Family(
        "Qwen2ForCausalLM", interleaved=False, config={"use_sliding_window": False}, stops=("<|endoftext|>",)
    ),
}


def require_gguf() -> None:
    """Raise EmbeddedModelError if the package that reads GGUF files is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise EmbeddedModelError(
            "reading a GGUF file needs the package gguf, which is not installed; pip install gguf"
        ) from None


class GgufModel:
    """A GGUF file of a Llama or Qwen2 model with a byte-level BPE tokenizer and tied embeddings.

    Raises:
        EmbeddedModelError: the package gguf is missing, or the file is none, or holds another architecture or
            tokenizer.
    """

    def __init__(self, path: Path) -> None:
        require_gguf()
        from gguf import GGUFReader

        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError) as error:
            raise EmbeddedModelError(f"{path} is not a complete GGUF file ({error})") from None
        self._architecture = self._field("general.architecture")
        tokenizer = self._field("tokenizer.ggml.model")
        if self._architecture not in _FAMILIES or tokenizer != "gpt2":
            raise EmbeddedModelError(
                f"{path} holds architecture '{self._architecture}' with tokenizer '{tokenizer}'; can be converted: "
                f"{', '.join(_FAMILIES)} with tokenizer 'gpt2'"
            )
        self._family = _FAMILIES[self._architecture]

    def write(self, folder: Path, name: str) -> None:
        """Write configuration, weights and tokenizer to `folder`. name: the model's hub id, stored in config.json."""
        tensors = dict(self.tensors())
        weights = folder / "model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod(0o644)  # safetensors makes a file that only its owner can read
        _write_json(folder / "config.json", self._config(name))
        special = {"bos_token_id": self._special_id("bos"), "eos_token_id": self._ends()}
        _write_json(folder / "generation_config.json", special | {"pad_token_id": self._special_id("pad")})
        self._write_tokenizer(folder)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and values in the form of transformers' model, in bf16."""
        from gguf import dequantize

        names = {tensor.name for tensor in self._reader.tensors}
        for tensor in self._reader.tensors:
            name = tensor.name
            if name == _EMBEDDING and _HEAD in names:
                continue  # two copies of one matrix: the head's is quantised to more bits
            values = dequantize(tensor.data, tensor.tensor_type)
            if self._family.interleaved and ".attn_q." in name:
                values = _undo_rope_order(values, self._size("attention.head_count"))
            elif self._family.interleaved and ".attn_k." in name:
                values = _undo_rope_order(values, self._size("attention.head_count_kv"))
            name = _hugging_face_name(_EMBEDDING if name == _HEAD else name)
            yield name, torch.from_numpy(np.array(values, np.float32)).to(torch.bfloat16)

    def _config(self, name: str) -> dict[str, Any]:
        num_heads = self._size("attention.head_count")
        return {
            "_name_or_path": name,
            "architectures": [self._family.causal_lm],
            "model_type": self._architecture,
            "num_hidden_layers": self._size("block_count"),
            "hidden_size": self._size("embedding_length"),
            "intermediate_size": self._size("feed_forward_length"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._size("attention.head_count_kv"),
            "head_dim": self._size("embedding_length") // num_heads,
            "vocab_size": len(self._field("tokenizer.ggml.tokens")),
            "max_position_embeddings": self._size("context_length"),
            "rope_theta": self._size("rope.freq_base"),
            # GGUF stores a float32; its shortest decimal form is the number in the original configuration.
            "rms_norm_eps": float(str(np.float32(self._size("attention.layer_norm_rms_epsilon")))),
            "hidden_act": "silu",
            **self._family.config,
            "tie_word_embeddings": True,
            "bos_token_id": self._special_id("bos"),
            "eos_token_id": self._special_id("eos"),
            "pad_token_id": self._special_id("pad"),
            "dtype": "bfloat16",
            "transformers_version": __version__,  # without it, transformers warns of a fault of older tokenizers
        }

    def _write_tokenizer(self, folder: Path) -> None:
        types = self._field("tokenizer.ggml.token_type")
        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        vocabulary = {t: i for i, (t, kind) in enumerate(zip(tokens, types)) if kind != _PADDING_TOKEN}
        merges = [_pair(merge) for merge in self._field("tokenizer.ggml.merges")]
        kinds = {_CONTROL_TOKEN: True, _ADDED_TOKEN: False}
        added = [
            AddedToken(t, special=kinds[kind], normalized=False) for t, kind in zip(tokens, types) if kind in kinds
        ]
        if self._architecture == "qwen2":
            self._write_qwen_tokenizer(folder, vocabulary, merges, added)
        else:
            self._write_plain_tokenizer(folder, vocabulary, merges, added)
        (folder / "chat_template.jinja").write_text(self._field("tokenizer.chat_template"))

    def _write_qwen_tokenizer(
        self, folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], added: list[AddedToken]
    ) -> None:
        from transformers import Qwen2Tokenizer

        tokens = list(vocabulary)
        tokenizer = Qwen2Tokenizer(
            vocab=vocabulary,
            merges=merges,
            eos_token=tokens[self._special_id("eos")],
            pad_token=tokens[self._special_id("pad")],
            unk_token=None,
            bos_token=None,
            model_max_length=self._size("context_length"),
        )
        tokenizer.add_tokens(added)
        tokenizer.save_pretrained(folder)

    def _write_plain_tokenizer(
        self, folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], added: list[AddedToken]
    ) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        splits_digits = self._field("tokenizer.ggml.pre") == "smollm"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if splits_digits else byte_level
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(added)
        tokenizer.save(str(folder / "tokenizer.json"))
        tokens = list(vocabulary)
        named = {f"{key}_token": tokens[self._special_id(key)] for key in ("bos", "eos", "pad", "unk")}
        _write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": self._size("context_length"),
                "clean_up_tokenization_spaces": False,
                **named,
            },
        )

    def _ends(self) -> int | list[int]:
        """Tokens that end a text: one id, or a list where the family has more."""
        end = self._special_id("eos")
        if not self._family.stops:
            return end
        tokens = self._field("tokenizer.ggml.tokens")
        return [end, *map(tokens.index, self._family.stops)]

    def _size(self, name: str) -> Any:
        return self._field(f"{self._architecture}.{name}")

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
    prefix, *rest = name.split(".")
    if prefix != "blk" or len(rest) != 3 or rest[1] not in _PER_LAYER or rest[2] not in ("weight", "bias"):
        raise EmbeddedModelError(
            f"the GGUF file holds a tensor {name}, which a Llama or Qwen2 with tied embeddings has not"
        )
    layer, part, kind = rest
    return f"model.layers.{layer}.{_PER_LAYER[part]}.{kind}"


def _undo_rope_order(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of each head for transformers' rotary embedding.

    GGUF stores the two rows of each rotated pair side by side; transformers stores all first rows, then all second
    rows. values: [rows, columns].
    """
    pairs = values.shape[0] // num_heads // 2
    return values.reshape(num_heads, pairs, 2, -1).swapaxes(1, 2).reshape(values.shape)


def _pair(merge: str) -> tuple[str, str]:
    first, second = merge.split(" ")
    return first, second


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
