"""The reference implementation of routing, which all other implementations are tested against.

It runs a Hugging Face Llama, Mistral, Qwen2 or Qwen3 in the model's dtype, one sequence at a time, without padding or
compiled code, and computes attention as two matrix products. Every position has its own path. A token skips a layer as
a whole (BUDDY, section 3.1): the hidden state passes unchanged, or through the layer's bypass if the artifact has one.
The KV policy decides what later positions see of that token in that layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.exit_adapter import ExitAdapter
from vllm_buddy.method.kv_policy import MASKED, ZERO, check_kv_policy
from vllm_buddy.method.model_config import check_config
from vllm_buddy.method.path import LayerPath, check_paths
from vllm_buddy.method.request_route import Route


@dataclass
class LayerCache:
    """The KV cache of one layer: K and V of the positions it can attend to, in order of position.

    positions: [n], int64. keys (rotated), values: [n, num_kv_heads, head_dim]. All are None before the first entry.
    """

    positions: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def append(
        self, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Add entries after the present ones; returns all (positions, keys, values)."""
        if self.positions is not None and self.keys is not None and self.values is not None:
            positions = torch.cat([self.positions, positions])
            keys = torch.cat([self.keys, keys])
            values = torch.cat([self.values, values])
        self.positions, self.keys, self.values = positions, keys, values
        return positions, keys, values


@dataclass(frozen=True)
class GeneratedSequence:
    """The result of `generate`.

    token_ids: the generated tokens, without the prompt.
    paths: the path of every position that ran, prompt first. The last generated token never runs, so the length is
        len(prompt) + len(token_ids) - 1.
    logprobs: natural log of the probability of each generated token.
    """

    token_ids: list[int]
    paths: list[LayerPath]
    logprobs: list[float] = field(default_factory=list)


@torch.no_grad()
def routed_logits(
    model: nn.Module,
    token_ids: Sequence[int],
    paths: Sequence[LayerPath],
    kv_policy: str,
    bypass: Bypass | None = None,
    adapter: ExitAdapter | None = None,
) -> torch.Tensor:
    """Compute the logits of every position from scratch.

    model: a Hugging Face causal language model (see model_config.check_config).
    paths: paths[t] is the path of position t; it must hold the first and the last layer.
    bypass: applied to rows that skip a layer, in the model's dtype.
    adapter: of the exit of a draft path, applied to all rows; it changes no row's K or V.

    Returns:
        [len(token_ids), vocab_size], in the model's dtype.

    Raises:
        ValueError: a token has no path, or a path lacks the first or the last layer.
        UnsupportedError, SettingsError: the model or the KV policy is not supported.
    """
    caches, bypass = _empty_cache(model, kv_policy), _like(model, bypass)
    adapter = adapter if adapter is None else adapter.to(_weight(model))
    return _advance(model, caches, 0, token_ids, paths, kv_policy, bypass, adapter)


@torch.no_grad()
def generate(
    model: nn.Module,
    route: Route,
    prompt: Sequence[int],
    max_new_tokens: int,
    kv_policy: str,
    bypass: Bypass | None = None,
) -> GeneratedSequence:
    """Decode greedily along the paths of a route.

    route: new, made for this prompt. prompt: at least one token id.
    max_new_tokens: tokens to generate; no token ends the sequence early. bypass: see routed_logits.
    """
    caches = _empty_cache(model, kv_policy)
    bypass = _like(model, bypass)
    token_ids = list(prompt)
    paths: list[LayerPath] = []
    logprobs: list[float] = []
    for _ in range(max_new_tokens):
        start = len(paths)
        new = [run.path for run in route.runs(start, len(token_ids) - start, token_ids) for _ in range(run.num_tokens)]
        logits = _advance(model, caches, start, token_ids[start:], new, kv_policy, bypass)[-1]
        paths += new
        token = int(logits.argmax())
        logprobs.append(float(logits.float().log_softmax(dim=-1)[token]))
        token_ids.append(token)
    return GeneratedSequence(token_ids[len(prompt) :], paths, logprobs)


def _empty_cache(model: Any, kv_policy: str) -> list[LayerCache]:
    check_config(model.config)
    check_kv_policy(kv_policy)
    return [LayerCache() for _ in model.model.layers]


def _like(model: Any, bypass: Bypass | None) -> Bypass | None:
    return None if bypass is None else bypass.to(_weight(model))


def _weight(model: Any) -> torch.Tensor:
    """A tensor with the model's dtype and device."""
    return model.model.embed_tokens.weight


def _advance(
    model: Any,
    caches: list[LayerCache],
    start: int,
    token_ids: Sequence[int],
    paths: Sequence[LayerPath],
    kv_policy: str,
    bypass: Bypass | None,
    adapter: ExitAdapter | None = None,
) -> torch.Tensor:
    """Run the tokens at positions start, start + 1, ..., extend `caches` and return the logits [n, vocab_size]."""
    if len(paths) != len(token_ids):
        raise ValueError(f"{len(token_ids)} tokens but {len(paths)} paths")
    check_paths(paths, len(caches))
    backbone = model.model
    device = backbone.embed_tokens.weight.device
    hidden = backbone.embed_tokens(torch.tensor(list(token_ids), device=device))
    positions = torch.arange(start, start + len(token_ids), device=device)
    cos, sin = (part[0] for part in backbone.rotary_emb(hidden, positions[None]))
    for index, (layer, cache) in enumerate(zip(backbone.layers, caches, strict=True)):
        runs = torch.tensor([bool(path >> index & 1) for path in paths], device=device)
        ran = _layer(layer, cache, hidden, positions, cos, sin, runs, kv_policy)
        if bypass is not None and not runs.all():
            ran[~runs] = bypass.apply(index, hidden[~runs])
        hidden = ran
    return model.lm_head(backbone.norm(hidden if adapter is None else adapter.apply(hidden)))


def _layer(
    layer: Any,
    cache: LayerCache,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    runs: torch.Tensor,
    kv_policy: str,
) -> torch.Tensor:
    """Run one layer on the rows where `runs` ([n], bool) is True; other rows pass. Returns a new tensor."""
    attention = layer.self_attn
    entries = runs if kv_policy == MASKED else torch.ones_like(runs)
    normed = layer.input_layernorm(hidden)
    keys = _rotate(_heads(attention, normed[entries], "k"), cos[entries], sin[entries])
    values = _heads(attention, normed[entries], "v")
    if kv_policy == ZERO:
        keys[~runs], values[~runs] = 0.0, 0.0
    kv_positions, keys, values = cache.append(positions[entries], keys, values)
    hidden = hidden.clone()
    if not runs.any():
        return hidden
    queries = _rotate(_heads(attention, normed[runs], "q"), cos[runs], sin[runs])
    visible = kv_positions[None, :] <= positions[runs][:, None]
    residual = hidden[runs]
    residual = residual + attention.o_proj(_attend(queries, keys, values, visible, attention.scaling))
    residual = residual + layer.mlp(layer.post_attention_layernorm(residual))
    hidden[runs] = residual
    return hidden


def _heads(attention: Any, normed: torch.Tensor, which: str) -> torch.Tensor:
    """Project `normed` [n, hidden] to q, k or v: [n, num_heads, head_dim], with Qwen3's norm per head."""
    projected = getattr(attention, f"{which}_proj")(normed)
    # The number of heads is spelt out because a view to -1 is ambiguous for zero rows.
    projected = projected.view(len(normed), projected.shape[-1] // attention.head_dim, attention.head_dim)
    norm = getattr(attention, f"{which}_norm", None)
    return projected if norm is None else norm(projected)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding in half-split order. x: [n, num_heads, head_dim]; cos, sin: [n, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Compute softmax attention: [n, num_heads * head_dim].

    queries: [n, num_heads, head_dim]; keys, values: [m, num_kv_heads, head_dim]; visible: [n, m], bool.
    """
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    logits = torch.einsum("nhd,mhd->hnm", queries, keys) * scaling
    weights = logits.masked_fill(~visible, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.einsum("hnm,mhd->nhd", weights, values).flatten(1)
