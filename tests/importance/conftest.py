"""Fixtures: tiny models, one of them with a tokenizer, and a text."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.harness.tiny_models import FAMILIES, VOCAB_SIZE, load_model, save_tiny_model

USELESS_LAYER = 3
WINDOW = 16


@dataclass(frozen=True)
class Measured:
    """A model whose layer USELESS_LAYER adds nothing to the hidden state. windows: [4, WINDOW] random token ids."""

    folder: Path
    model: nn.Module
    windows: torch.Tensor


@pytest.fixture(scope="session", params=FAMILIES)
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = save_tiny_model(tmp_path_factory.mktemp("measured"), request.param)
    model = load_model(folder)
    layer = model.model.layers[USELESS_LAYER]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    windows = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB_SIZE, (4, WINDOW)))
    return Measured(folder, model, windows)


@pytest.fixture(scope="session")
def model_with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama whose tokens are bytes."""
    return with_byte_tokenizer(save_tiny_model(tmp_path_factory.mktemp("bytes"), "llama"))


def with_byte_tokenizer(folder: Path) -> Path:
    """Write a tokenizer whose tokens are bytes to the folder of a model, and return the folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of 1,000 characters, each one token of the tokenizer above."""
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. 1234\n" * 20)
    return path
