"""A decoder layer in pieces, for kernels that fuse its first norm with the movement of rows.

The layers of vLLM's Llama, Qwen2 and Qwen3 are all input_layernorm -> self_attn -> post_attention_layernorm -> mlp.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm_buddy_kernels import Kernels

from vllm_buddy.method.bypass import Bypass


def after_norm(
    layer: Any, positions: torch.Tensor, normed: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a vLLM decoder layer does behind its input_layernorm.

    positions: [num_rows]; normed, residual: [num_rows, hidden_size]. Returns (hidden_states, residual).
    """
    hidden = layer.self_attn(positions=positions, hidden_states=normed)
    hidden, residual = layer.post_attention_layernorm(hidden, residual)
    return layer.mlp(hidden), residual


@dataclass(frozen=True)
class FusedBypass:
    """The bypass of one layer, in one launch. down: [rank, hidden_size]; up: [hidden_size, rank]."""

    down: torch.Tensor
    up: torch.Tensor
    eps: float
    kernels: Kernels

    def __call__(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, None]:
        """In the form of a layer, on all rows."""
        return self.on_rows(hidden, residual, torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)), None

    def on_rows(self, hidden: torch.Tensor, residual: torch.Tensor | None, skips: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size], the state behind the bypass of rows that skip the layer; others are undefined.

        skips: [num_tokens], bool.
        """
        return self.kernels.bypass_rows(hidden, residual, skips, self.down, self.up, self.eps)


def fused_bypasses(bypass: Bypass, kernels: Kernels) -> list[FusedBypass | None]:
    """One for each layer of the model; None for the first and the last, which no row skips."""
    pairs = zip(bypass.down.unbind(), bypass.up.unbind())
    return [None, *(FusedBypass(down, up, bypass.eps, kernels) for down, up in pairs), None]


def passed_by(
    bypasses: Sequence[FusedBypass | None] | None, hidden: torch.Tensor, residual: torch.Tensor | None, skips: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The pair behind several layers for rows that skip them all; other rows are undefined where there is a bypass.

    bypasses: of these layers; None if the artifact has none. skips: [num_tokens], bool.
    """
    for bypass in bypasses or ():
        assert bypass is not None
        hidden, residual = bypass.on_rows(hidden, residual, skips), None
    return hidden, residual
