"""The forward pass of one routed step: each layer runs on the rows whose path holds it, its bypass on the others."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.sequence import IntermediateTensors
from vllm_buddy_kernels import Kernels

from vllm_buddy.serving.forward.adapters import RoutedAdapters
from vllm_buddy.serving.forward.auxiliary import AuxiliaryStates, ModelOutput
from vllm_buddy.serving.forward.compiled import LayerFn
from vllm_buddy.serving.forward.layer import FusedBypass, after_norm, passed_by
from vllm_buddy.serving.forward.pipeline import executed_of
from vllm_buddy.serving.kv import KVPolicy, LayerView

if TYPE_CHECKING:
    from vllm_buddy.serving.forward.models import RoutedBackbone

# Hidden states and residual, whose sum is the state of a row; None: hidden is the whole state.
Pair = tuple[torch.Tensor, torch.Tensor | None]


@dataclass
class RoutedStep:
    """Views of a worker's layers for one step, and the count of executed layers.

    views: one per layer of the pipeline stage; without pipeline parallelism, of the model.
    executed: [num_tokens], layers executed per token row, counted as they run.
    kernels: what moves rows, fused with the first norm of a span and with its bypasses; None: torch's indexing, between
        functions of any kind.
    adapters: LoRA adapters of the batch's rows, which layers apply; None: there are none.
    bypasses: in place of those of the model, see `run`; None: those of the model.
    exit_adapter: applied to all rows after the last layer, before the last norm, called like a layer; None: there is
        none.
    """

    policy: KVPolicy
    views: Sequence[LayerView]
    executed: np.ndarray
    kernels: Kernels | None = None
    adapters: RoutedAdapters | None = None
    bypasses: Sequence[LayerFn | None] | None = None
    exit_adapter: LayerFn | None = None
    _before: torch.Tensor | None = None  # as `executed`, of the stages before

    def forward(
        self,
        backbone: "RoutedBackbone",
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        intermediate_tensors: IntermediateTensors | None = None,
    ) -> ModelOutput:
        """What RoutedBackbone.leave returns."""
        hidden, residual = backbone.enter(input_ids, inputs_embeds, intermediate_tensors)
        if intermediate_tensors is not None:
            self._before = executed_of(intermediate_tensors)
        auxiliary = AuxiliaryStates(backbone.aux_hidden_state_layers)
        with override_forward_context(self._forward_context(backbone.attention_names)):
            bypasses = backbone.bypasses if self.bypasses is None else self.bypasses
            state = self.run(backbone.stage, backbone.functions, positions, hidden, residual, bypasses, auxiliary)
        if self.exit_adapter is not None:
            state = self.exit_adapter(positions, *state)
        executed = torch.from_numpy(self.executed)
        if self._before is not None:
            executed = executed.to(self._before) + self._before
        return backbone.leave(*state, auxiliary, executed)

    def counts(self) -> np.ndarray:
        """[num_tokens], layers executed per token row in this stage and in those before it."""
        return self.executed if self._before is None else self.executed + self._before.cpu().numpy()

    def run(
        self,
        layers: Sequence[Any],
        functions: Sequence[LayerFn | None],
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        bypasses: Sequence[Any] | None = None,
        auxiliary: AuxiliaryStates | None = None,
    ) -> Pair:
        """Run all layers of the stage on hidden states.

        layers, functions: the layers, and what computes them (with kernels: the same); None: one that is not loaded,
            which no row runs.
        bypasses: for each layer, what computes the rows that skip it; None: they pass unchanged.
        positions: [num_tokens]; hidden, residual: [num_tokens, hidden_size], which may be overwritten.
        auxiliary: takes the states that a drafter asked for.
        """
        auxiliary = auxiliary or AuxiliaryStates()
        index = 0
        while index < len(layers):
            auxiliary.pass_by(index, hidden, residual)
            view = self.views[index]
            span = range(index, index + 1 if view.is_empty else self._span_end(index, auxiliary.layers))
            num_run = sum(not self.views[i].is_empty for i in span)
            skips = [self._skip(layers[i], self.views[i], bypasses[i] if bypasses else None) for i in span]
            chain = [skip if self.views[i].is_empty else functions[i] for i, skip in zip(span, skips)]
            if self.adapters is not None:
                self.adapters.buddy_rows = view.rows
            if view.rows is None:  # one chain for all rows
                hidden, residual = _call(chain, positions, hidden, residual)
                self.executed += num_run
            else:
                if self.kernels:
                    if view.skipped_slots is not None:
                        self._write_skipped(layers[index], view, positions, hidden, residual)
                    passing = bypasses[span.start : span.stop] if bypasses else None
                    hidden, residual = self._fused(view, layers[index], chain[1:], passing, positions, hidden, residual)
                else:
                    hidden, residual = _indexed(view, chain, skips, positions, hidden, residual)
                self.executed[view.rows_np] += num_run
            index = span.stop
        auxiliary.pass_by(len(layers), hidden, residual)
        if self.adapters is not None:
            self.adapters.buddy_rows = None
        return hidden, residual

    def _skip(self, layer: Any, view: LayerView, bypass: Any) -> LayerFn | None:
        """What the rows that skip a layer go through, called like a layer on them alone; None: nothing."""
        if view.skipped_slots is None:
            return bypass
        if getattr(bypass, "writes_kv", False):
            return partial(bypass, slots=view.skipped_slots)

        def write_and_pass(positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None) -> Pair:
            self.policy.write_skipped(layer, positions, hidden, residual, view.skipped_slots)
            return (hidden, residual) if bypass is None else bypass(positions, hidden, residual)

        return write_and_pass

    def _write_skipped(
        self, layer: Any, view: LayerView, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        rows = view.skipped_rows(hidden)
        rest = None if residual is None else residual.index_select(0, rows)
        self.policy.write_skipped(
            layer, positions.index_select(0, rows), hidden.index_select(0, rows), rest, view.skipped_slots
        )

    def _fused(
        self,
        view: LayerView,
        first: Any,
        others: Sequence[LayerFn | None],
        skipping: Sequence[FusedBypass | None] | None,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> Pair:
        """Run `first` and `others` on the rows of a view and `skipping` on the other rows, by kernels."""
        assert self.kernels is not None
        assert view.rows is not None
        norm, rows, source = first.input_layernorm, view.rows, view.source(hidden)
        eps = norm.variance_epsilon
        normed, state = self.kernels.gather_rows(hidden, residual, rows, norm.weight, eps)
        positions_rows = positions.index_select(0, rows)
        ran, ran_residual = _call(others, positions_rows, *after_norm(first, positions_rows, normed, state))
        assert ran_residual is not None  # every layer returns one
        passed = passed_by(skipping, hidden, residual, source < 0)
        return self.kernels.scatter_rows(ran, ran_residual, source, *passed, None, eps)[1], None

    def _span_end(self, start: int, seen: Collection[int]) -> int:
        """One past the last layer that the same rows run, without other rows in between.

        Over a span rows are gathered once and scattered once. Layers that no row runs do not end it, unless they leave
        something in the cache: then all rows go through them at once. Kernels run the rows that skip apart, which
        would be too late for what a later layer of the span reads in the cache. A span ends before each layer of
        `seen`, where the states of all rows are wanted.
        """
        rows = self.views[start].rows_np
        end = start + 1
        for index in range(start + 1, len(self.views)):
            view = self.views[index]
            if index in seen or (view.skipped_slots is not None and (self.kernels or view.is_empty)):
                break
            if not view.is_empty:
                if not _same_rows(rows, view.rows_np):
                    break
                end = index + 1
        return end

    def _forward_context(self, names: Sequence[str]) -> Any:
        """vLLM's forward context with the metadata and slots of each layer in this step. vLLM's own is not changed."""
        context = get_forward_context()
        if all(view.attn_metadata is None for view in self.views):
            return context
        attn_metadata, slot_mapping = dict(context.attn_metadata), dict(context.slot_mapping)
        for name, view in zip(names, self.views, strict=True):
            if view.attn_metadata is not None:
                attn_metadata[name] = view.attn_metadata
                slot_mapping[name] = view.slot_mapping
        return replace(context, attn_metadata=attn_metadata, slot_mapping=slot_mapping)


def _same_rows(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or np.array_equal(a, b)


def _indexed(
    view: LayerView,
    chain: Sequence[LayerFn | None],
    skips: Sequence[LayerFn | None],
    positions: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> Pair:
    """Run `chain` on the rows of a view and `skips` on the other rows, in place.

    Layer by layer, and the rows that skip first: what they leave in a layer's cache is read by those that run it.
    """
    assert residual is not None  # layer 0, the only one without, runs on all rows
    assert view.rows is not None
    groups = [(view.rows, chain)]
    if any(skips):
        groups.insert(0, (view.skipped_rows(hidden), skips))
    # Indexing would take twice as long on the few rows of a decode step.
    places = [positions.index_select(0, rows) for rows, _ in groups]
    states: list[Pair] = [(hidden.index_select(0, rows), residual.index_select(0, rows)) for rows, _ in groups]
    for functions in zip(*(functions for _, functions in groups)):
        for number, function in enumerate(functions):
            states[number] = _call([function], places[number], *states[number])
    for (rows, _), (hidden_rows, residual_rows) in zip(groups, states):
        assert residual_rows is not None
        hidden.index_copy_(0, rows, hidden_rows)
        residual.index_copy_(0, rows, residual_rows)
    return hidden, residual


def _call(
    functions: Sequence[LayerFn | None], positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
) -> Pair:
    """Chain functions; rows pass unchanged where there is None."""
    for function in functions:
        if function is not None:
            hidden, residual = function(positions, hidden, residual)
    return hidden, residual
