"""How much KV cache to ask vLLM for, by size: a share of a busy machine's memory may not be free."""

import json
from pathlib import Path

_LARGEST_BLOCK = 128  # tokens per KV block, at most


def kv_bytes(model_dir: Path, num_sequences: int, num_tokens: int, dtype: str) -> int:
    """For so many sequences of so many tokens each, in whole blocks. dtype: of the cache, float32 or of 2 bytes."""
    config = json.loads((model_dir / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    per_token = 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head_dim
    element = 4 if dtype == "float32" else 2
    return num_sequences * per_token * element * (-(-num_tokens // _LARGEST_BLOCK) + 1) * _LARGEST_BLOCK
