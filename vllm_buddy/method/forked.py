"""The routed forward of one sequence on many paths at once, sharing what they have in common.

Two paths that agree up to a layer have the same hidden states there, so a state is computed once for all paths with
the same beginning. What runs a layer, and what skips it, goes through it as one batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vllm_buddy.method.batched import dense_layer, embed
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.path import LayerPath
from vllm_buddy.method.reference import check_config


def forked_hidden(
    model: nn.Module, token_ids: torch.Tensor, paths: Sequence[LayerPath], bypass: Bypass | None = None
) -> torch.Tensor:
    """Hidden states behind the last layer, before the final norm: [len(paths), length, hidden_size].

    Equal to `batched.routed_hidden` with every token on one path. Under any KV policy: where a layer is skipped by the
    whole sequence, nothing reads what it leaves in the cache.

    token_ids: [length], int64. paths: each holds the first and the last layer; the same one may occur twice.
    """
    check_config(model.config)
    backbone: Any = model.model
    num_layers = len(backbone.layers)
    ends = 1 | 1 << (num_layers - 1)
    if any(path & ends != ends or path >> num_layers for path in paths):
        raise ValueError(f"every path must hold layers 0 and {num_layers - 1}, and none beyond")
    hidden, rotary = embed(model, token_ids[None])
    bypass = bypass.to(hidden) if bypass is not None else None
    beginnings = [0]  # of paths, one for each row of `hidden`
    for index, layer in enumerate(backbone.layers):
        below = (1 << index) - 1
        wanted = list(dict.fromkeys(path & (below << 1 | 1) for path in paths))
        rows = torch.tensor([beginnings.index(path & below) for path in wanted], device=hidden.device)
        runs = torch.tensor([path >> index & 1 for path in wanted], dtype=torch.bool, device=hidden.device)
        output = hidden[rows]
        if runs.any():
            output[runs] = dense_layer(layer, hidden[rows[runs]], rotary)
        if bypass is not None and not runs.all():
            output[~runs] = bypass.apply(index, hidden[rows[~runs]])
        hidden, beginnings = output, wanted
    return hidden[[beginnings.index(path) for path in paths]]
