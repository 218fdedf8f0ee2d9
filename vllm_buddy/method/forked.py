"""Runs a Hugging Face model on one sequence along many paths at once and computes shared hidden states once.

Paths that agree on the layers up to some layer have the same hidden state there, so it is computed once for all of
them. At each layer, the states that run it form one batch, and the states that skip it form another.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vllm_buddy.method.batched import dense_layer, embed
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.model_config import check_config
from vllm_buddy.method.path import LayerPath, check_paths
from vllm_buddy.method.sharded import enter_layer, leave_layer


def forked_hidden(
    model: nn.Module, token_ids: torch.Tensor, paths: Sequence[LayerPath], bypass: Bypass | None = None
) -> torch.Tensor:
    """Return the hidden states after the last layer, before the final norm: [len(paths), length, hidden_size].

    The result equals `batched.routed_hidden` with all tokens on the same path. It holds for every KV policy: where the
    whole sequence skips a layer, nothing reads that layer's cache.

    token_ids: [length], int64. paths: each holds the first and the last layer; a path may occur more than once.

    Raises:
        ValueError: a path lacks the first or the last layer, or holds a layer beyond it.
        UnsupportedError: the model is not supported.
    """
    check_config(model.config)
    backbone: Any = model.model
    check_paths(paths, len(backbone.layers))
    hidden, rotary = embed(model, token_ids[None])
    bypass = bypass.to(hidden) if bypass is not None else None
    beginnings = [0]  # the bits of each path below `index`, one entry per row of `hidden`
    for index, layer in enumerate(backbone.layers):
        below = (1 << index) - 1
        wanted = list(dict.fromkeys(path & (below << 1 | 1) for path in paths))
        rows = torch.tensor([beginnings.index(path & below) for path in wanted], device=hidden.device)
        runs = torch.tensor([path >> index & 1 for path in wanted], dtype=torch.bool, device=hidden.device)
        hidden = enter_layer(model, index, hidden)
        output = hidden[rows]
        if runs.any():
            output[runs] = dense_layer(layer, hidden[rows[runs]], rotary)
        if bypass is not None and not runs.all():
            output[~runs] = bypass.apply(index, hidden[rows[~runs]])
        hidden, beginnings = leave_layer(model, index, output), wanted
    return hidden[[beginnings.index(path) for path in paths]]
