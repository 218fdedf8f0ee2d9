"""Defines models with the real shapes of Llama-3.1-8B and Qwen2.5-7B: the cost of a decode step depends only on shapes.

The weights are drawn when vLLM loads the model (`drawn_weights.py`), so a model's folder holds only config.json.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_buddy.artifact import Artifact
from vllm_buddy.artifact.config import FORMAT_VERSION, BuddyConfig, PriorConfig
from vllm_buddy.artifact.fingerprint import NO_WEIGHTS, BaseModelIdentity
from vllm_buddy.method.bypass import Bypass

BYPASS_RANK = 64
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_BYPASS_GAIN = 0.3  # of what a bypass adds to a normed state: enough to notice if it is missing, less than a layer adds


@dataclass(frozen=True)
class ModelShape:
    """A model described by its config.json."""

    name: str
    config: Mapping[str, Any]

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    def save(self, folder: Path, num_layers: int | None = None) -> Path:
        """Write the folder of the model, or of the model with fewer layers, and return `folder`."""
        folder.mkdir(parents=True)
        config = {**self.config, "num_hidden_layers": num_layers or self.num_layers}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return folder

    def artifact(self, bypass_rank: int = BYPASS_RANK) -> Artifact:
        """Return an artifact with random bypasses and evenly spaced layers at every depth, without Decision Module."""
        hidden_size, num_middle = self.config["hidden_size"], self.num_layers - 2
        identity = BaseModelIdentity(
            id=self.name,
            architecture=self.config["architectures"][0],
            num_layers=self.num_layers,
            hidden_size=hidden_size,
            vocab_size=self.vocab_size,
            fingerprint=NO_WEIGHTS,
        )
        generator = torch.Generator().manual_seed(0)
        down = torch.randn(num_middle, bypass_rank, hidden_size, generator=generator) / hidden_size**0.5
        up = _BYPASS_GAIN * torch.randn(num_middle, hidden_size, bypass_rank, generator=generator) / bypass_rank**0.5
        config = BuddyConfig(
            format_version=FORMAT_VERSION,
            name=self.name,
            base_model=identity,
            prior=PriorConfig(indicator="evenly spaced", calibration="none", num_tokens=0),
            has_decision_module=False,
            bypass_rank=bypass_rank,
            bypass_eps=self.config["rms_norm_eps"],
        )
        return Artifact(config, evenly_spaced(num_middle), bypass=Bypass(down, up, self.config["rms_norm_eps"]))


def evenly_spaced(num_middle: int) -> np.ndarray:
    """Return a prior whose k largest entries are evenly spread for any k.

    It consists of the fractional parts of multiples of the golden ratio.
    """
    fractions = (np.arange(1, num_middle + 1) * _GOLDEN_RATIO) % 1
    return ((fractions - fractions.mean()) / fractions.std()).astype(np.float32)


def _config(architecture: str, model_type: str, **sizes: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        **sizes,
    }


LLAMA_8B = ModelShape(
    "Llama-3.1-8B",
    _config(
        "LlamaForCausalLM",
        "llama",
        num_hidden_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=128000,
        eos_token_id=128001,
    ),
)
QWEN_7B = ModelShape(
    "Qwen2.5-7B-Instruct",
    _config(
        "Qwen2ForCausalLM",
        "qwen2",
        num_hidden_layers=28,
        hidden_size=3584,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        use_sliding_window=False,
        bos_token_id=151643,
        eos_token_id=151645,
    ),
)
MODEL_SHAPES = {shape.name: shape for shape in (LLAMA_8B, QWEN_7B)}
