"""Loads configuration, model and tokenizer from a Hugging Face folder, with errors that a user can act on."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_buddy.errors import ModelError, UnsupportedError
from vllm_buddy.method.model_config import check_config
from vllm_buddy.models.quantised import Quantisation, make_differentiable, quantisation_config

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_config(folder: Path) -> Any:
    """Load the Hugging Face configuration of the model in `folder`.

    Raises:
        ModelError: the configuration cannot be read.
        UnsupportedError: the model is not a dense Llama, Mistral, Qwen2 or Qwen3.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: transformers cannot read config.json ({error})") from None
    check_config(config)
    return config


def load_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantisation: Quantisation | None = None,
) -> nn.Module:
    """Load the causal language model in `folder` for inference.

    quantisation: of the linear layers, made while they are loaded; gradients pass them.

    Raises:
        ModelError: the files cannot be loaded, or the package that quantises is missing.
        UnsupportedError: the model is not a dense Llama, Mistral, Qwen2 or Qwen3, or is quantised.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    if getattr(config, "quantization_config", None):
        raise UnsupportedError(
            f"{folder} is quantised; measure the model it was made from, the artifact fits both. Where that does not "
            "fit into memory, `vllm-buddy train base_quantisation=nf4` quantises it while it is loaded"
        )
    quantised = {}
    if quantisation is not None:
        quantised = {"quantization_config": quantisation_config(quantisation, dtype), "device_map": {"": device}}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **quantised).eval()
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: transformers cannot load the model ({error})") from None
    return model.to(device) if quantisation is None else make_differentiable(model)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in `folder`.

    Raises:
        ModelError: there is no tokenizer, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    # Without tokenizer files, transformers creates an empty tokenizer that finds no tokens.
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer files; wanted is {' or '.join(_TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} has no tokenizer that can be loaded ({error})") from None
