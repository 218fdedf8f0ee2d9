"""Decoder layers and bypasses in the form that the kernels take: in pieces, because a kernel computes the first norm.

The layers of vLLM's Llama, Mistral, Qwen2 and Qwen3 are all input_layernorm -> self_attn ->
post_attention_layernorm -> mlp.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm_buddy_kernels import KernelError, Kernels, OutOfResources
from vllm_buddy_kernels.layer_slots import LAUNCH_BLOCKS

from vllm_buddy.errors import UnsupportedError
from vllm_buddy.method.bypass import Bypass


def after_norm(
    layer: Any, positions: torch.Tensor, normed: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a vLLM decoder layer does after its input_layernorm.

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
        self, _positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, None]:
        """In the form of a layer, on all rows."""
        return self.on_rows(hidden, residual, torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)), None

    def on_rows(self, hidden: torch.Tensor, residual: torch.Tensor | None, skips: torch.Tensor) -> torch.Tensor:
        """The state [num_tokens, hidden_size] after the bypass, of rows that skip the layer; other rows are undefined.

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
    """Hidden and residual after several layers, of rows that skip them all; other rows are undefined with a bypass.

    bypasses: of these layers; None if the artifact has none. skips: [num_tokens], bool.
    """
    for bypass in bypasses or ():
        assert bypass is not None
        hidden, residual = bypass.on_rows(hidden, residual, skips), None
    return hidden, residual


def try_kernels(
    layers: Sequence[Any], bypasses: Sequence[FusedBypass | None] | None, kernels: Kernels, block_size: int
) -> None:
    """Run each kernel once in each form that serving uses, so that none is compiled while a request waits.

    layers, bypasses: those of this worker; layers that are not loaded are left out.
    block_size: of the KV cache, in tokens.

    Raises:
        UnsupportedError: one does not take this model's shapes, or not on this device.
    """
    norm = layers[0].input_layernorm
    weight, eps = norm.weight, norm.variance_epsilon
    hidden = torch.zeros(2, len(weight), dtype=weight.dtype, device=weight.device)
    row = torch.zeros(1, dtype=torch.int32, device=weight.device)
    try:
        for residual in (hidden, None):
            normed, state = kernels.gather_rows(hidden, residual, row.long(), weight, eps)
            for norm_weight in (weight, None):
                source = row.repeat(2) - 1
                kernels.scatter_rows(normed, state, source, hidden, residual, norm_weight, eps)
            any_bypass = [bypass for bypass in bypasses or () if bypass is not None][:1]
            passed_by(any_bypass, hidden, residual, torch.ones(2, dtype=torch.bool, device=row.device))
        for width in LAUNCH_BLOCKS:
            slots = torch.empty(1, width, dtype=torch.int64, device=row.device)
            run_start = torch.tensor([0, 1], dtype=torch.int32, device=row.device)
            for first_block in (None, row[None]):
                kernels.layer_slots(
                    row[None],
                    row.repeat(width),
                    row,
                    run_start,
                    row[None],
                    first_block,
                    block_size,
                    0,
                    slots,
                    row[None].clone(),
                )
    except (KernelError, OutOfResources) as error:
        raise UnsupportedError(f'{error}; set "kernels": "reference" to serve this model without Triton') from None
