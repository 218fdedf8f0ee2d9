"""A Hugging Face model folder as model and tokenizer, with errors a user understands."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_buddy.errors import ModelError, UnsupportedError
from vllm_buddy.method.reference import check_config

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_config(folder: Path) -> Any:
    """The Hugging Face configuration of the model in `folder`.

    Raises:
        ModelError: it cannot be read.
        UnsupportedError: it is not that of a dense Llama, Qwen2 or Qwen3.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: transformers cannot read config.json ({error})") from None
    check_config(config)
    return config


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The causal language model in `folder`, for inference.

    Raises:
        ModelError: the files cannot be loaded.
        UnsupportedError: it is not a dense Llama, Qwen2 or Qwen3, or is quantised.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    if getattr(config, "quantization_config", None):
        raise UnsupportedError(f"{folder} is quantised; measure the model it was made from, the artifact fits both")
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: transformers cannot load the model ({error})") from None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    # Asked explicitly: without any file transformers makes up an empty tokenizer that finds no tokens.
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer files; wanted is {' or '.join(_TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} has no tokenizer that can be loaded ({error})") from None
