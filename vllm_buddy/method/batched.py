"""Runs a Hugging Face model along given paths for many sequences at once, fast and differentiable.

The results equal those of `reference.py`. Rows that skip a layer are not computed. Under the KV policy `masked`, the
rows of a sequence that run a layer are packed to the front, as in the serving KV cache. Keys are rotated before packing
and keep their order, so causal attention over the packed rows equals attention that masks the skipped positions. Right
padding is harmless, because attention is causal.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpointed

from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.kv_policy import MASKED, ZERO, check_kv_policy
from vllm_buddy.method.model_config import check_config
from vllm_buddy.method.sharded import enter_layer, gathered, leave_layer


def routed_hidden(
    model: nn.Module,
    token_ids: torch.Tensor,
    masks: torch.Tensor,
    kv_policy: str = MASKED,
    bypass: Bypass | None = None,
    gates: torch.Tensor | None = None,
    *,
    checkpoint: bool = False,
) -> torch.Tensor:
    """Return the hidden states after the last layer, before the final norm: [batch, length, hidden_size].

    model: a Hugging Face causal language model (see model_config.check_config); computed in its dtype.
    token_ids: [batch, length], int64.
    masks: [batch, length, num_layers], bool: which token runs which layer. Every token runs the first and last layer.
    gates: [batch, num_layers], 1.0 where a sequence runs a layer and 0.0 where it skips it. They give the router's
        scores a gradient (BUDDY, section 3.3: H + M F(H)). F is then also computed for skipped layers, without a
        gradient through F itself. All tokens of a sequence must have the same path.

    checkpoint: whether a layer's activations are computed again in the backward pass instead of kept (gradient
        checkpointing): less memory, and about a third more time.

    Raises:
        ValueError: `masks` has another shape or lacks an end layer, or a sequence with gates has several paths.
        UnsupportedError, SettingsError: the model or the KV policy is not supported.
    """
    check_config(model.config)
    check_kv_policy(kv_policy)
    backbone: Any = model.model
    batch, length = token_ids.shape
    if masks.shape != (batch, length, len(backbone.layers)) or not (masks[..., 0].all() and masks[..., -1].all()):
        raise ValueError(f"masks of shape {tuple(masks.shape)} must be True for the first and the last layer")
    hidden, rotary = embed(model, token_ids)
    bypass = bypass.to(hidden) if bypass is not None else None
    for index, layer in enumerate(backbone.layers):
        gate = None if gates is None or index in (0, len(backbone.layers) - 1) else gates[:, index]
        run = partial(checkpointed, _routed_layer, use_reentrant=False) if checkpoint else _routed_layer
        hidden = enter_layer(model, index, hidden)
        hidden = run(layer, index, hidden, masks[..., index], rotary, kv_policy, bypass, gate)
        hidden = leave_layer(model, index, hidden)
    return hidden


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding of the rows that go through a layer. cos, sin: [..., length, head_dim]."""

    cos: torch.Tensor
    sin: torch.Tensor

    def at(self, positions: torch.Tensor) -> "Rotary":
        """Return the embedding of the rows at `positions`: [batch, rows]."""
        return Rotary(self.cos[positions], self.sin[positions])

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x: [batch, num_heads, rows, head_dim], in Hugging Face's half-split order."""
        cos, sin = (t if t.dim() == 2 else t[:, None] for t in (self.cos, self.sin))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin


def embed(model: nn.Module, token_ids: torch.Tensor) -> tuple[torch.Tensor, Rotary]:
    """Return the embeddings [batch, length, hidden_size] of token_ids [batch, length] and their rotary embedding."""
    backbone: Any = model.model
    with gathered(backbone.embed_tokens):
        hidden = nn.functional.embedding(token_ids, backbone.embed_tokens.weight)
    positions = torch.arange(token_ids.shape[1], device=token_ids.device)
    cos, sin = (part[0] for part in backbone.rotary_emb(hidden, positions[None]))
    return hidden, Rotary(cos, sin)


def _routed_layer(
    layer: Any,
    index: int,
    hidden: torch.Tensor,
    runs: torch.Tensor,
    rotary: Rotary,
    kv_policy: str,
    bypass: Bypass | None,
    gate: torch.Tensor | None,
) -> torch.Tensor:
    """Run one layer. hidden: [batch, length, hidden_size]; runs: [batch, length], bool; gate: [batch]."""
    whole = runs.all(dim=1)
    if gate is not None:
        if not (whole == runs.any(dim=1)).all():
            raise ValueError("gates need one path per sequence")
        return _gated_layer(layer, index, hidden, whole, rotary, bypass, gate)
    if whole.all():
        return dense_layer(layer, hidden, rotary)
    some = runs.any(dim=1)
    if not some.any():
        return hidden if bypass is None else bypass.apply(index, hidden)
    if (whole == some).all():  # each sequence runs it for all of its tokens or for none
        ran, skipped = whole.nonzero()[:, 0], (~whole).nonzero()[:, 0]
        output = hidden.index_copy(0, ran, dense_layer(layer, hidden[ran], rotary))
        return output if bypass is None else output.index_copy(0, skipped, bypass.apply(index, hidden[skipped]))
    rows, columns, padding = _pack(runs)
    if kv_policy == MASKED:
        packed = dense_layer(layer, hidden[rows[:, None], columns], rotary.at(columns))
    else:
        packed = _sparse_layer(layer, hidden[rows], columns, runs[rows], rotary, kv_policy)
    batch_index = rows[:, None].expand_as(columns)[~padding], columns[~padding]
    output = hidden if bypass is None else torch.where(runs[..., None], hidden, bypass.apply(index, hidden))
    return output.index_put(batch_index, packed[~padding])


def _gated_layer(
    layer: Any,
    index: int,
    hidden: torch.Tensor,
    ran: torch.Tensor,
    rotary: Rotary,
    bypass: Bypass | None,
    gate: torch.Tensor,
) -> torch.Tensor:
    """H + M F(H) + (1 - M) bypass(H), with a gradient for M whether it is 0 or 1. ran: [batch], bool."""
    output = hidden
    for rows, executed in ((ran.nonzero()[:, 0], True), ((~ran).nonzero()[:, 0], False)):
        if len(rows) == 0:
            continue
        inputs = hidden[rows]
        with torch.set_grad_enabled(executed and torch.is_grad_enabled()):
            delta = dense_layer(layer, inputs, rotary) - inputs
        m = gate[rows][:, None, None].to(hidden.dtype)
        mixed = inputs + m * delta
        if bypass is not None:
            mixed = mixed + (1 - m) * (bypass.apply(index, inputs) - inputs)
        output = output.index_copy(0, rows, mixed)
    return output


def dense_layer(layer: Any, hidden: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Run a decoder layer with causal attention on all rows of `hidden`: [batch, rows, hidden_size]."""
    attention = layer.self_attn
    normed = rms_norm(layer.input_layernorm, hidden)
    queries, keys = (rotary.apply(heads(attention, normed, which)) for which in "qk")
    mixed = _attend(queries, keys, heads(attention, normed, "v"), None, attention.scaling)
    return after_attention(layer, hidden, mixed)


def _sparse_layer(
    layer: Any, hidden: torch.Tensor, columns: torch.Tensor, runs: torch.Tensor, rotary: Rotary, kv_policy: str
) -> torch.Tensor:
    """Run a layer with queries of packed rows and keys and values of every position (`kv_only`, `zero`).

    hidden: [batch, length, hidden_size]; columns: [batch, rows], positions of the packed rows; runs: [batch, length].
    """
    attention = layer.self_attn
    inputs = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
    normed = rms_norm(layer.input_layernorm, hidden)
    queries = rotary.at(columns).apply(heads(attention, rms_norm(layer.input_layernorm, inputs), "q"))
    keys, values = rotary.apply(heads(attention, normed, "k")), heads(attention, normed, "v")
    if kv_policy == ZERO:
        keys, values = keys * runs[:, None, :, None], values * runs[:, None, :, None]
    mixed = _attend(queries, keys, values, columns, attention.scaling)
    return after_attention(layer, inputs, mixed)


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Causal attention with grouped heads: [batch, num_heads, rows, head_dim].

    In training on CPU by plain products, which with their gradient take half the time of torch's fused attention there.

    queries: [batch, num_heads, rows, head_dim]. keys, values: [batch, num_kv_heads, length, head_dim], those of
    positions 0, 1, ... positions: [batch, rows], of the queries; None: those of the keys.
    """
    fused = queries.device.type != "cpu" or not torch.is_grad_enabled()
    if fused and positions is None:
        return nn.functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scaling, enable_gqa=True
        )
    columns = torch.arange(keys.shape[2], device=keys.device)
    visible = columns <= (columns[None] if positions is None else positions)[..., None]
    visible = visible[:, None]
    if fused:
        return nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible, scale=scaling, enable_gqa=True
        )
    rows, group = queries.shape[2], queries.shape[1] // keys.shape[1]
    bias = torch.zeros(visible.shape, dtype=queries.dtype).masked_fill(~visible, -torch.inf)
    grouped = queries.unflatten(1, (-1, group)).flatten(2, 3) @ keys.transpose(-1, -2)
    weights = (grouped.unflatten(2, (group, rows)) * scaling + bias.unsqueeze(-3)).softmax(dim=-1)
    return (weights.flatten(2, 3) @ values).unflatten(2, (group, rows)).flatten(1, 2)


def after_attention(layer: Any, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    """The output projection and the MLP. mixed: attention output, [batch, num_heads, rows, head_dim]."""
    hidden = hidden + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(rms_norm(layer.post_attention_layernorm, hidden))


def heads(attention: Any, normed: torch.Tensor, which: str) -> torch.Tensor:
    """Project to q, k or v: [batch, num_heads, rows, head_dim], with Qwen3's norm per head where the model has one."""
    projected = getattr(attention, f"{which}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)
    return (projected if norm is None else rms_norm(norm, projected)).transpose(1, 2)


def rms_norm(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Apply a Hugging Face RMSNorm as one fused operation."""
    return nn.functional.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def _pack(runs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the positions where `runs` [batch, length] is True, per sequence, padded to the longest one.

    Returns:
        rows: [n], the sequences with at least one such position.
        columns: [n, m], their positions in ascending order, padded with the sequence's last position.
        padding: [n, m], bool, True where `columns` is padding.
    """
    rows = runs.any(dim=1).nonzero()[:, 0]
    counts = runs[rows].sum(dim=1)
    longest = int(counts.max())
    order = runs[rows].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    padding = torch.arange(longest, device=runs.device) >= counts[:, None]
    return rows, order.masked_fill(padding, runs.shape[1] - 1), padding
