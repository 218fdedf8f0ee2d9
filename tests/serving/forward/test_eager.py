"""One step of layers and bypasses, without an engine: what is called on which rows, and what is copied between."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_buddy.method import ExitAdapter
from vllm_buddy.serving.forward.auxiliary import AuxiliaryStates
from vllm_buddy.serving.forward.eager import RoutedStep
from vllm_buddy.serving.kv import LayerView

NUM_ROWS = 4
ALL = tuple(range(NUM_ROWS))
HIDDEN = 3


def view(rows: tuple[int, ...]) -> LayerView:
    if rows == ALL:
        return LayerView()
    array = np.array(rows, dtype=np.int64)
    return LayerView(array, torch.from_numpy(array) if rows else None)


class Recorder:
    """Layers and bypasses that log (kind, index, rows) and add to hidden what tells them apart."""

    def __init__(self, num_layers: int) -> None:
        self.calls: list[tuple[str, int, tuple[int, ...]]] = []
        self.regathered: list[int] = []  # calls whose input is not the output of the last call on the same rows
        self.layers = [self._function("layer", i, 100.0**i) for i in range(num_layers)]
        self.bypasses = [self._function("bypass", i, 10 * 100.0**i) for i in range(num_layers)]
        self._last: dict[tuple[int, ...], torch.Tensor] = {}

    def _function(self, kind: str, index: int, amount: float) -> Any:
        def call(positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
            rows = tuple(positions.tolist())
            if rows in self._last and hidden is not self._last[rows]:
                self.regathered.append(len(self.calls))
            self.calls.append((kind, index, rows))
            self._last[rows] = hidden + amount
            return self._last[rows], torch.zeros_like(hidden)

        return call


def run(
    rows_of_layers: list[tuple[int, ...]], *, bypass: bool, auxiliary: AuxiliaryStates | None = None
) -> tuple[Recorder, torch.Tensor, np.ndarray]:
    from vllm.forward_context import override_forward_context

    recorder = Recorder(len(rows_of_layers))
    step = RoutedStep(SimpleNamespace(), [view(r) for r in rows_of_layers], np.zeros(NUM_ROWS, dtype=np.int32))  # type: ignore[arg-type]
    hidden = torch.zeros(NUM_ROWS, HIDDEN, dtype=torch.float64)
    with override_forward_context(SimpleNamespace()):
        hidden, _ = step.run(
            recorder.layers,
            recorder.layers,
            torch.arange(NUM_ROWS),
            hidden,
            None,
            recorder.bypasses if bypass else None,
            auxiliary,
        )
    return recorder, hidden, step.executed


A, B = (0, 2), (1, 3)
STEPS = {
    "everybody": [ALL] * 4,
    "one path": [ALL, (), (), ALL, (), ALL],
    "two paths": [ALL, A, A, B, (), B, ALL],
    "gaps": [ALL, A, (), A, (), (), B, ALL],
    "full depth beside one path": [ALL, ALL, A, A, A, ALL],
}


@pytest.mark.parametrize("bypass", [False, True], ids=("bare", "bypass"))
@pytest.mark.parametrize("name", STEPS)
def test_each_row_goes_through_its_layers_and_its_bypasses_in_order(name: str, bypass: bool) -> None:
    """Fails if a row misses a bypass, gets one of a layer it runs, or is lost between gathering and scattering."""
    rows_of_layers = STEPS[name]
    recorder, hidden, executed = run(rows_of_layers, bypass=bypass)
    for row in range(NUM_ROWS):
        seen = [(kind, index) for kind, index, rows in recorder.calls if row in rows]
        ran = [row in rows for rows in rows_of_layers]
        assert seen == [("layer" if r else "bypass", i) for i, r in enumerate(ran) if r or bypass]
        wanted = sum(100.0**i * (1 if r else 10 * bypass) for i, r in enumerate(ran))
        assert hidden[row].tolist() == [wanted] * HIDDEN
        assert executed[row] == sum(ran)


@pytest.mark.parametrize("bypass", [False, True], ids=("bare", "bypass"))
@pytest.mark.parametrize("name", STEPS)
def test_the_states_between_layers_are_those_of_all_rows(name: str, bypass: bool) -> None:
    """Fails if a state is taken while rows are gathered, or a later layer overwrites it."""
    rows_of_layers = STEPS[name]
    auxiliary = AuxiliaryStates(range(1, len(rows_of_layers) + 1))
    _, hidden, _ = run(rows_of_layers, bypass=bypass, auxiliary=auxiliary)
    same, states = auxiliary.beside(hidden)
    assert same is hidden
    assert len(states) == len(rows_of_layers)
    for layer, state in enumerate(states, start=1):
        for row in range(NUM_ROWS):
            ran = [row in rows for rows in rows_of_layers[:layer]]
            assert state[row, 0] == sum(100.0**i * (1 if r else 10 * bypass) for i, r in enumerate(ran))


def test_rows_stay_together_while_the_same_rows_skip() -> None:
    """Fails if rows are gathered again for each layer or bypass, which costs more than the bypass."""
    for name, num_calls in (("one path", 6), ("full depth beside one path", 2 + 3 + 3 + 1)):
        recorder, _, _ = run(STEPS[name], bypass=True)
        assert len(recorder.calls) == num_calls
        assert recorder.regathered == []
    # Layers that nobody runs: once for all rows, unless the same rows run the layer behind them.
    recorder, _, _ = run(STEPS["gaps"], bypass=True)
    calls = [(index, rows) for kind, index, rows in recorder.calls if kind == "bypass"]
    assert calls == [(1, B), (2, B), (2, A), (3, B), (4, ALL), (5, ALL), (6, A)]


def test_what_a_skipped_layer_leaves_in_the_cache_is_there_before_the_layer_runs() -> None:
    """Fails if a token attends to keys and values of another one of the same step that are not written yet."""
    from vllm.forward_context import override_forward_context

    recorder = Recorder(4)
    views = [view(rows) for rows in (ALL, A, A, ALL)]
    slots = torch.arange(100, 100 + len(B))
    for one in views[1:3]:
        one.skipped_slots = slots

    def write(layer: Any, positions: torch.Tensor, hidden: Any, residual: Any, where: torch.Tensor) -> None:
        assert where is slots
        recorder.calls.append(("write", recorder.layers.index(layer), tuple(positions.tolist())))

    step = RoutedStep(SimpleNamespace(write_skipped=write), views, np.zeros(NUM_ROWS, dtype=np.int32))  # type: ignore[arg-type]
    hidden = torch.zeros(NUM_ROWS, HIDDEN, dtype=torch.float64)
    with override_forward_context(SimpleNamespace()):
        step.run(recorder.layers, recorder.layers, torch.arange(NUM_ROWS), hidden, None, recorder.bypasses)
    middle = [(kind, index, rows) for kind, index, rows in recorder.calls if index in (1, 2)]
    assert middle == [(kind, i, r) for i in (1, 2) for kind, r in (("write", B), ("bypass", B), ("layer", A))]
    assert recorder.regathered == []


def test_nothing_of_a_bypass_runs_where_everybody_runs_every_layer() -> None:
    """Fails if requests at full depth pay for the bypass of others that are not there."""
    recorder, _, _ = run(STEPS["everybody"], bypass=True)
    assert [kind for kind, _, _ in recorder.calls] == ["layer"] * 4


@pytest.mark.parametrize("last_residual", [False, True])
def test_the_adapter_of_an_exit_stands_before_the_last_norm(last_residual: bool) -> None:
    """Fails if the adapter sees a part of the state only, or the norm gets the state without it."""
    from vllm.forward_context import override_forward_context

    hidden, residual = torch.randn(2, NUM_ROWS, HIDDEN, generator=torch.Generator().manual_seed(0)).unbind()
    adapter = ExitAdapter(torch.randn(2, HIDDEN), torch.randn(HIDDEN, 2), 1e-5)
    left = []

    def adapt(_positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor) -> Any:
        return adapter.delta(hidden + residual), hidden + residual

    def layer(positions: torch.Tensor, hidden: torch.Tensor, _: Any) -> Any:
        return hidden, residual.clone() if last_residual else torch.zeros_like(hidden)

    backbone = SimpleNamespace(
        enter=lambda *_: (hidden.clone(), None),
        leave=lambda *state: left.append(state),
        aux_hidden_state_layers=(),
        attention_names=["a"],
        stage=[layer],
        functions=[layer],
        bypasses=None,
    )
    step = RoutedStep(SimpleNamespace(), [LayerView()], np.zeros(NUM_ROWS, dtype=np.int32), exit_adapter=adapt)  # type: ignore[arg-type]
    with override_forward_context(SimpleNamespace()):
        step.forward(backbone, None, torch.arange(NUM_ROWS), None)
    ((added, state, *_),) = left
    whole = hidden + residual if last_residual else hidden
    torch.testing.assert_close(state, whole)
    torch.testing.assert_close(added + state, adapter.apply(whole))
