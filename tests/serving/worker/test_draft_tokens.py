"""The head of the tokens that drafts choose among. What it says is compared in `test_lossless.py`."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_buddy.errors import SettingsError
from vllm_buddy.serving.worker.draft_tokens import likeliest_of


def test_a_quantised_head_is_refused_with_the_way_out() -> None:
    """Fails if rows are taken of packed weights, or the refusal says nothing of the setting that helps."""
    model = SimpleNamespace(lm_head=SimpleNamespace(quant_method=object(), weight=torch.zeros(8, 4, dtype=torch.int8)))
    with pytest.raises(SettingsError, match=r"the model's head is quantised; serve with drafts.vocabulary: all"):
        likeliest_of(model, np.arange(3))


def test_all_tokens_are_said_by_the_models_own_head() -> None:
    """Fails if a head of its own is made where nothing is left out, which would double the head's memory."""
    model = SimpleNamespace(compute_logits=lambda hidden: hidden @ torch.eye(4)[:, [2, 0, 3, 1]])
    assert likeliest_of(model, None)(torch.eye(4)).tolist() == [1, 3, 0, 2]
