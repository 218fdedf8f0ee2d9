"""The forward pass of one step: every layer runs on the rows whose path holds it, and on no others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context, override_forward_context

from vllm_buddy.serving.kv_policy import KVPolicy, LayerView
from vllm_buddy.serving.layer_compile import LayerFn


@dataclass
class RoutedStep:
    """Views of all layers for one step, and the count of what was executed.

    views: one per layer of the model.
    executed: [num_tokens], layers executed per token row, counted as they run.
    """

    policy: KVPolicy
    views: Sequence[LayerView]
    executed: np.ndarray

    def run(
        self,
        layers: Sequence[Any],
        functions: Sequence[LayerFn],
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run layers on hidden states.

        layers, functions: all layers of the model and what computes them.
        positions: [num_tokens]; hidden, residual: [num_tokens, hidden_size], updated in place where rows are skipped.
        """
        with override_forward_context(self._forward_context(layers)):
            index = 0
            while index < len(layers):
                view = self.views[index]
                if view.skipped is not None:
                    self.policy.write_skipped(layers[index], view, positions, hidden, residual)
                if view.is_empty:
                    index += 1
                    continue
                end = self._span_end(index)
                span = [functions[i] for i in range(index, end) if not self.views[i].is_empty]
                if view.rows is None:
                    for function in span:
                        hidden, residual = function(positions, hidden, residual)
                    self.executed += len(span)
                else:
                    assert residual is not None  # layer 0 runs on all rows
                    hidden_rows, residual_rows = hidden[view.rows], residual[view.rows]
                    positions_rows = positions[view.rows]
                    for function in span:
                        hidden_rows, residual_rows = function(positions_rows, hidden_rows, residual_rows)
                    hidden.index_copy_(0, view.rows, hidden_rows)
                    residual.index_copy_(0, view.rows, residual_rows)
                    self.executed[view.rows_np] += len(span)
                index = end
        assert residual is not None
        return hidden, residual

    def _span_end(self, start: int) -> int:
        """First layer after `start` that runs other rows, or before which skipped rows must be written.

        Over a span rows are gathered once and scattered once. Layers that nobody runs do not end it.
        """
        rows = self.views[start].rows_np
        end = start + 1
        while end < len(self.views):
            view = self.views[end]
            if view.skipped is not None or not (view.is_empty or _same_rows(rows, view.rows_np)):
                break
            end += 1
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
