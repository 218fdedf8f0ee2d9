"""Drafts from a path of the model after every position of a text at once, as lossless mode makes them one by one.

A draft of a request reads K and V of the whole model for the tokens before the chain, and those of the path for the
drafts before it. So the pass for the second draft of all chains is one over all positions, in which each reads its own
predecessor's draft entries. Chains are those of correct drafts: a chain whose first draft is wrong goes no further, and
the text is what the model says.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.method.batched import Rotary, after_attention, dense_layer, embed, heads, rms_norm
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.draft_head import DraftHead
from vllm_buddy.method.exit_adapter import ExitAdapter
from vllm_buddy.method.model_config import check_config
from vllm_buddy.method.path import LayerPath

KV = tuple[torch.Tensor, torch.Tensor]  # [batch, num_kv_heads, length, head_dim] each


@torch.no_grad()
def full_states(model: nn.Module, token_ids: torch.Tensor) -> tuple[torch.Tensor, list[KV]]:
    """The states after the whole model's last layer, before the last norm, and the K and V of its layers.

    token_ids: [batch, length].

    Returns:
        [batch, length, hidden_size]; one pair per layer.
    """
    check_config(model.config)
    hidden, rotary = embed(model, token_ids)
    kept = []
    for layer in model.model.layers:  # type: ignore[union-attr]
        attention, normed = layer.self_attn, rms_norm(layer.input_layernorm, hidden)
        kept.append((rotary.apply(heads(attention, normed, "k")), heads(attention, normed, "v")))
        hidden = dense_layer(layer, hidden, rotary)
    return hidden, kept


@torch.no_grad()
def full_pass(model: nn.Module, token_ids: torch.Tensor) -> tuple[torch.Tensor, list[KV]]:
    """What the whole model says after each token of token_ids [batch, length], and the K and V of its layers.

    Returns:
        [batch, length] int64, the likeliest next tokens; one pair per layer.
    """
    hidden, kept = full_states(model, token_ids)
    return DraftHead(_head(model)).likeliest(_normed(model, hidden)), kept


@torch.no_grad()
def draft_chains(
    model: nn.Module,
    token_ids: torch.Tensor,
    path: LayerPath,
    length: int,
    full: Sequence[KV],
    bypass: Bypass | None = None,
    adapter: ExitAdapter | None = None,
    vocabulary: np.ndarray | None = None,
) -> torch.Tensor:
    """What `path` says after each token, as the first to the length-th token of a chain of drafts.

    token_ids: [batch, num_tokens]. full: what full_pass keeps of them. bypass: of skipped layers, or of the gaps of the
    path. adapter: of its exit. vocabulary: the tokens that drafts choose among; None: all.

    Returns:
        [length, batch, num_tokens] int64. Entry [i, :, p] is the draft after token p if the i tokens up to p were
        drafts too, and the same as in the text. Undefined for p < i.
    """
    states = draft_states(model, token_ids, path, length, full, bypass)
    if adapter is not None:
        adapter = adapter.to(states[0])
        states = [adapter.apply(hidden) for hidden in states]
    head = DraftHead.of(_head(model), vocabulary)
    return torch.stack([head.likeliest(_normed(model, hidden)) for hidden in states])


def draft_states(
    model: nn.Module,
    token_ids: torch.Tensor,
    path: LayerPath,
    length: int,
    full: Sequence[KV],
    bypass: Bypass | None = None,
) -> list[torch.Tensor]:
    """The states in which the passes of draft_chains end, before adapter, norm and head. Same arguments.

    Differentiable in the bypass.

    Returns:
        `length` times [batch, num_tokens, hidden_size].
    """
    backbone: Any = model.model
    chain: list[dict[int, KV]] = []
    states = []
    for _ in range(length):
        hidden, rotary = embed(model, token_ids)
        bypass = bypass and bypass.to(hidden)
        drafted = {}
        for index, layer in enumerate(backbone.layers):
            if path >> index & 1:
                before = [entries[index] for entries in chain]
                hidden, drafted[index] = draft_layer(layer, hidden, rotary, full[index], before)
            elif bypass is not None:
                hidden = bypass.apply(index, hidden)
        chain.append(drafted)
        states.append(hidden)
    return states


def draft_layer(
    layer: Any, hidden: torch.Tensor, rotary: Rotary, full: KV, before: Sequence[KV] = ()
) -> tuple[torch.Tensor, KV]:
    """Run a layer at every position as the newest of a chain of len(before) + 1 tokens.

    hidden: [batch, length, hidden_size]. full: K and V of the whole model. before: what this layer left of the drafts
    before in the chain, each where it was the newest.

    Returns:
        the output, and the K and V that belong into `before` of the next draft.
    """
    attention, normed = layer.self_attn, rms_norm(layer.input_layernorm, hidden)
    queries = rotary.apply(heads(attention, normed, "q"))
    own = rotary.apply(heads(attention, normed, "k")), heads(attention, normed, "v")
    mixed = _attend(queries, full, [*before, own], attention.scaling)
    return after_attention(layer, hidden, mixed), own


def _attend(queries: torch.Tensor, full: KV, chain: Sequence[KV], scaling: float) -> torch.Tensor:
    """Attention of position p to `full` before p - n, and to chain[i] at p - n + i, where n = len(chain) - 1.

    queries: [batch, num_heads, length, head_dim], as the result.
    """
    group, length, last = queries.shape[1] // full[0].shape[1], queries.shape[2], len(chain) - 1
    keys, values = (part.repeat_interleave(group, dim=1) for part in full)
    positions = torch.arange(length, device=queries.device)
    unseen = positions[None, :] >= positions[:, None] - last
    scores = [(queries @ keys.transpose(-1, -2)).masked_fill(unseen, float("-inf"))]
    own = [[part.repeat_interleave(group, dim=1).roll(last - i, dims=2) for part in kv] for i, kv in enumerate(chain)]
    scores += [(queries * key).sum(dim=-1, keepdim=True) for key, _ in own]
    weights = (torch.cat(scores, dim=-1) * scaling).softmax(dim=-1, dtype=torch.float32).to(values.dtype)
    mixed = weights[..., :length] @ values
    for i, (_, value) in enumerate(own):
        mixed = mixed + weights[..., length + i : length + i + 1] * value
    return mixed


def _head(model: Any) -> torch.Tensor:
    return model.lm_head.weight


def _normed(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    return rms_norm(model.model.norm, hidden)
