"""Signatures of the ops that serving calls, and `Kernels`, which holds one implementation of each.

Each op exists as a Triton kernel and as a plain-PyTorch reference. Both have the signature given here. The module of
an op documents its arguments, dtypes and errors in full.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class LayerSlots(Protocol):
    def __call__(
        self,
        block_table: torch.Tensor,
        token_run: torch.Tensor,
        run_request: torch.Tensor,
        run_start: torch.Tensor,
        first_position: torch.Tensor,
        first_block: torch.Tensor | None,
        block_size: int,
        idle_length: int,
        slots: torch.Tensor,
        lengths: torch.Tensor,
    ) -> None:
        """Write the KV slots [num_views, num_token_columns] and lengths [num_views, num_run_columns] of all views."""


class GatherRows(Protocol):
    def __call__(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rows: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return RMSNorm of hidden + residual, and the sum itself, of `rows`: each [num_rows, hidden_size]."""
        ...


class ScatterRows(Protocol):
    def __call__(
        self,
        hidden_rows: torch.Tensor,
        residual_rows: torch.Tensor,
        source: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Merge rows that ran a layer with those that skipped it; return the norm (None without weight) and the state.

        Both are [num_tokens, hidden_size].
        """
        ...


class BypassRows(Protocol):
    def __call__(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        skips: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        """Return the state after a skipped layer, [num_tokens, hidden_size]; rows that run the layer are undefined."""
        ...


@dataclass(frozen=True)
class Kernels:
    """One implementation of each op that serving calls."""

    layer_slots: LayerSlots
    gather_rows: GatherRows
    scatter_rows: ScatterRows
    bypass_rows: BypassRows
