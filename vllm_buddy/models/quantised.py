"""Quantises a base model while it is loaded, for training, which leaves the base as it is.

bitsandbytes does it: 8 bits per channel, or 4 bits in blocks of 64 (NF4 with quantised scales, as in QLoRA, arXiv
2305.14314). Embedding, norms and head keep the model's dtype.
"""

import importlib.util
from typing import Any, Literal

import torch
from torch import nn

from vllm_buddy.errors import ModelError

Quantisation = Literal["int8", "nf4"]


def quantisation_config(kind: Quantisation, dtype: torch.dtype) -> Any:
    """Return the configuration with which transformers quantises a model of `dtype`.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"a base in {kind} needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def make_differentiable(model: nn.Module) -> nn.Module:
    """Keep the weights of a quantised model in the layout that gradients can pass; returns `model`.

    On CPU, bitsandbytes repacks 4-bit weights for inference at the first call without a gradient, after which there is
    no gradient, and quantises the activations of 8-bit layers, unless the layers are in training mode.
    """
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.train()
    return model
