"""The forward pass of one step: every layer runs on the rows whose path holds it, its bypass on the others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context, override_forward_context
from vllm_buddy_kernels import Kernels

from vllm_buddy.serving.forward.compiled import LayerFn
from vllm_buddy.serving.forward.layer import after_norm, passed_by
from vllm_buddy.serving.kv import KVPolicy, LayerView


@dataclass
class RoutedStep:
    """Views of all layers for one step, and the count of what was executed.

    views: one per layer of the model.
    executed: [num_tokens], layers executed per token row, counted as they run.
    kernels: what moves rows, fused with the first norm of a span and with its bypasses; None: torch's indexing, between
        functions of any kind.
    """

    policy: KVPolicy
    views: Sequence[LayerView]
    executed: np.ndarray
    kernels: Kernels | None = None

    def run(
        self,
        layers: Sequence[Any],
        functions: Sequence[LayerFn],
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        bypasses: Sequence[Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run layers on hidden states.

        layers, functions: all layers of the model and what computes them; with kernels the same.
        bypasses: what computes the rows that skip a layer, one for each; None: they pass unchanged.
        positions: [num_tokens]; hidden, residual: [num_tokens, hidden_size], which may be overwritten.
        """
        with override_forward_context(self._forward_context(layers)):
            index = 0
            while index < len(layers):
                view = self.views[index]
                if view.skipped_slots is not None:
                    self.policy.write_skipped(layers[index], view, positions, hidden, residual)
                span = range(index, index + 1 if view.is_empty else self._span_end(index))
                num_run = sum(not self.views[i].is_empty for i in span)
                chain = [
                    bypasses[i] if bypasses and self.views[i].is_empty else functions[i]
                    for i in span
                    if bypasses or not self.views[i].is_empty
                ]
                if view.rows is None:  # one chain for all rows
                    hidden, residual = _call(chain, positions, hidden, residual)
                    self.executed += num_run
                else:
                    skipping = bypasses[span.start : span.stop] if bypasses else None
                    move = self._fused if self.kernels else _indexed
                    hidden, residual = move(view, layers[index], chain, skipping, positions, hidden, residual)
                    self.executed[view.rows_np] += num_run
                index = span.stop
        return hidden, residual

    def _fused(
        self, view: LayerView, first: Any, chain: Any, skipping: Any, positions: Any, hidden: Any, residual: Any
    ) -> tuple[torch.Tensor, None]:
        """What _indexed does, on states that are one sum. first: the layer that the chain begins with."""
        assert self.kernels is not None
        assert view.rows is not None
        norm, num_tokens, rows = first.input_layernorm, len(hidden), view.rows
        eps = norm.variance_epsilon
        source = torch.full((num_tokens,), -1, dtype=torch.int32, device=hidden.device)
        source.index_copy_(0, rows, torch.arange(len(rows), dtype=torch.int32, device=hidden.device))
        normed, state = self.kernels.gather_rows(hidden, residual, rows, norm.weight, eps)
        positions_rows = positions.index_select(0, rows)
        ran = after_norm(first, positions_rows, normed, state)
        ran = _call(chain[1:], positions_rows, *ran)
        passed = passed_by(skipping, hidden, residual, source < 0)
        return self.kernels.scatter_rows(*ran, source, *passed, None, eps)[1], None

    def _span_end(self, start: int) -> int:
        """Behind the last layer that the same rows run, without other rows or a write of skipped rows between.

        Over a span rows are gathered once and scattered once. Layers that nobody runs do not end it.
        """
        rows = self.views[start].rows_np
        end = start + 1
        for index in range(start + 1, len(self.views)):
            view = self.views[index]
            if view.skipped_slots is not None:
                break
            if not view.is_empty:
                if not _same_rows(rows, view.rows_np):
                    break
                end = index + 1
        return end

    def _forward_context(self, layers: Sequence[Any]) -> Any:
        """vLLM's forward context with this step's metadata and slots of each layer. vLLM's own is left alone."""
        context = get_forward_context()
        if all(view.attn_metadata is None for view in self.views):
            return context
        attn_metadata, slot_mapping = dict(context.attn_metadata), dict(context.slot_mapping)
        for layer, view in zip(layers, self.views, strict=True):
            if view.attn_metadata is not None:
                name = layer.self_attn.attn.layer_name
                attn_metadata[name] = view.attn_metadata
                slot_mapping[name] = view.slot_mapping
        return replace(context, attn_metadata=attn_metadata, slot_mapping=slot_mapping)


def _same_rows(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or np.array_equal(a, b)


def _indexed(
    view: LayerView, _first: Any, chain: Any, skipping: Any, positions: Any, hidden: Any, residual: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `chain` on the rows of a view and `skipping` on the others, where they lie."""
    assert residual is not None
    assert view.rows is not None
    parts: list[tuple[torch.Tensor, Sequence[LayerFn]]] = [(view.rows, chain)]
    if skipping:
        parts.append((view.skipped_rows(hidden), skipping))
    for rows, part in parts:
        # Indexing would cost twice as much on the few rows of a decode step.
        before = (state.index_select(0, rows) for state in (positions, hidden, residual))
        hidden_rows, residual_rows = _call(part, *before)
        hidden.index_copy_(0, rows, hidden_rows)
        residual.index_copy_(0, rows, residual_rows)
    return hidden, residual


def _call(functions: Sequence[LayerFn], positions: torch.Tensor, hidden: Any, residual: Any) -> tuple[Any, Any]:
    for function in functions:
        hidden, residual = function(positions, hidden, residual)
    return hidden, residual
