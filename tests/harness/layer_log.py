"""Records which layers run on which token, independently of the engine's own count."""

from collections import Counter
from types import TracebackType
from typing import Any

import pytest
import torch

from tests.harness.engine import Engine
from vllm_buddy.serving.forward.eager import RoutedStep

# The number of a row is stored in its position, above these bits, so it follows whatever the plugin does to positions.
_ROW_SHIFT = 20
_POSITION = (1 << _ROW_SHIFT) - 1


class LayerLog:
    """Counts (request, position, layer) while it is entered.

    ran: the layer computed the token. bypassed: the layer's bypass did. wrote: the token skipped the layer and the KV
    policy wrote to the layer's cache.
    """

    def __init__(self, engine: Engine) -> None:
        self.ran: Counter[tuple[str, int, int]] = Counter()
        self.bypassed: Counter[tuple[str, int, int]] = Counter()
        self.wrote: Counter[tuple[str, int, int]] = Counter()
        self._engine = engine
        self._patch = pytest.MonkeyPatch()
        self._rows: list[tuple[str, int]] = []
        self._batch: Any = None  # for Model Runner V2, which does not keep its batch

    def __enter__(self) -> "LayerLog":
        run, write = RoutedStep.run, self._engine.runner.buddy_state.policy.write_skipped
        layers = list(self._engine.runner.model.model.layers)

        def logged_run(
            step: Any,
            layers: Any,
            functions: Any,
            positions: torch.Tensor,
            hidden: Any,
            residual: Any,
            bypasses: Any,
            auxiliary: Any,
        ) -> Any:
            self._rows = self._owners(positions)
            tagged = positions + (torch.arange(len(positions)) << _ROW_SHIFT)
            ran = [self._watched(self.ran, i, f) for i, f in enumerate(functions)]
            bypassed = bypasses and [self._watched(self.bypassed, i, f) for i, f in enumerate(bypasses)]
            return run(step, layers, ran, tagged, hidden, residual, bypassed, auxiliary)

        def logged_write(layer: Any, positions: torch.Tensor, *others: Any) -> None:
            self._count(self.wrote, positions, layers.index(layer))
            write(layer, positions & _POSITION, *others)

        if not hasattr(self._engine.runner, "input_batch"):
            state = self._engine.runner.model_state
            prepare_inputs = state.prepare_inputs

            def kept(input_batch: Any, req_states: Any) -> Any:
                self._batch = input_batch
                return prepare_inputs(input_batch, req_states)

            self._patch.setattr(state, "prepare_inputs", kept)
        self._patch.setattr(RoutedStep, "run", logged_run)
        self._patch.setattr(self._engine.runner.buddy_state.policy, "write_skipped", logged_write)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patch.undo()

    def _watched(self, counter: Counter[tuple[str, int, int]], index: int, function: Any) -> Any:
        def layer(positions: torch.Tensor, *state: Any, **slots: Any) -> Any:
            self._count(counter, positions, index)
            if slots:
                self._count(self.wrote, positions, index)
            return function(positions & _POSITION, *state, **slots)

        layer.writes_kv = getattr(function, "writes_kv", False)  # type: ignore[attr-defined]
        return layer

    def _count(self, counter: Counter[tuple[str, int, int]], tagged: torch.Tensor, layer: int) -> None:
        for value in tagged.tolist():
            request, position = self._rows[value >> _ROW_SHIFT]
            assert position == value & _POSITION
            counter[request, position, layer] += 1

    def _owners(self, positions: torch.Tensor) -> list[tuple[str, int]]:
        """Return (request, position) of each row, from vLLM's own batch. vLLM appends a random tail to request ids."""
        runner, batch = self._engine.runner, self._batch
        if batch is None:
            batch, start = runner.input_batch, runner.query_start_loc.np
        else:
            start = batch.query_start_loc_np
        return [
            (req_id.rsplit("-", 1)[0], int(positions[row]))
            for i, req_id in enumerate(batch.req_ids)
            for row in range(start[i], start[i + 1])
        ]
