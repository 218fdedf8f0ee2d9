"""Computes how many bytes of KV cache a number of sequences needs.

vLLM is started with this size, because its default, a share of the machine's memory, may not be free on a busy machine.
"""

import json
from pathlib import Path

_LARGEST_BLOCK = 128  # most tokens that a KV block can hold


def kv_bytes(model_dir: Path, num_sequences: int, num_tokens: int, dtype: str) -> int:
    """Return the bytes of KV cache for `num_sequences` of `num_tokens` each.

    Each sequence is rounded up to whole blocks and gets one more block.

    dtype: of the cache; "float32" takes 4 bytes, every other one 2.
    """
    config = json.loads((model_dir / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    per_token = 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head_dim
    element = 4 if dtype == "float32" else 2
    return num_sequences * per_token * element * (-(-num_tokens // _LARGEST_BLOCK) + 1) * _LARGEST_BLOCK
