"""What the start of a server captures, and where it is refused."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest

from tests.harness.engine import Ask, Engine
from tests.harness.graph_log import KERNELS, SIZES
from vllm_buddy.errors import SettingsError
from vllm_buddy.method.kv_policy import MASKED
from vllm_buddy.serving.graphs.capture import OutOfGraphMemory
from vllm_buddy.serving.graphs.decode import paths_of_ranks
from vllm_buddy.serving.start.setting_sections import GraphSettings
from vllm_buddy.serving.worker import state as worker_state


def test_units_whose_tables_take_too_much_memory_are_refused_with_the_numbers(engines: Callable[..., Engine]) -> None:
    """Fails if a server with units starts whose steps would never be replayed."""
    engine = engines("llama", KERNELS, units=True)
    with pytest.raises(SettingsError, match=r"takes \d+ MiB for block tables .* graphs.memory_mib"):
        engine.capture(SIZES, memory_limit=1000)


@pytest.mark.parametrize(("tensor_parallel_size", "captures_left"), [(1, None), (2, 400)])
def test_start_up_captures_what_the_settings_say(
    llama: Engine, monkeypatch: pytest.MonkeyPatch, tensor_parallel_size: int, captures_left: int | None
) -> None:
    """Fails if a server with graphs starts without, with others, or cannot make them anew."""
    bodies_seen: list[int] = []

    def capture(bodies: Any, warm_up: bool = False) -> Any:
        assert warm_up or len(bodies) == 1
        for body in bodies if warm_up else ():
            body()
        bodies_seen.append(len(bodies))
        return list(bodies), 1 << 20

    made: list[Any] = []
    monkeypatch.setattr(worker_state, "CudaCapture", lambda device: made.append(device) or capture)
    llama.configure(MASKED, 0)
    state = llama.state
    graphs = GraphSettings(enabled=True, sizes=(2, 8), memory_mib=64)
    monkeypatch.setattr(state, "_settings", state._settings.model_copy(update={"graphs": graphs, "kernels": KERNELS}))
    monkeypatch.setattr(state, "_capture", None)
    for _ in range(2):
        with monkeypatch.context() as ranks:
            ranks.setattr(llama.core.vllm_config.parallel_config, "tensor_parallel_size", tensor_parallel_size)
            state.start_serving(llama.runner.model.model)
        assert state.serving
        assert state.graphs.sizes == [2, 8]
        assert len(made) == 1
        assert state.graphs.paths.limit == (62 << 20) - state.graphs._buffers.tables.nbytes
        assert state.graphs.paths.captures_left == captures_left
    ask = Ask((5, 6, 7), 0.5, 9)
    llama.check([ask], llama.run([ask]))
    assert bodies_seen == [bodies_seen[0]] * 4 + [1]


def test_a_start_without_memory_for_graphs_says_what_to_do(llama: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a device that is full at start ends it in an error that names no setting."""
    llama.configure(MASKED, 0)
    graphs = GraphSettings(enabled=True, sizes=(2, 8), memory_mib=64)
    monkeypatch.setattr(llama.state, "_settings", llama.state._settings.model_copy(update={"graphs": graphs}))
    monkeypatch.setattr(llama.state, "_capture", Mock(side_effect=OutOfGraphMemory("9 MiB of device memory are free")))
    with pytest.raises(SettingsError, match=r"9 MiB of device memory are free\); give fewer graphs\.sizes"):
        llama.state.start_serving(llama.runner.model.model)


@pytest.mark.parametrize(("num_layers", "num_sizes"), [(30, 13), (64, 13), (77, 13), (80, 13), (126, 13), (126, 60)])
def test_ranks_capture_what_their_all_reduce_can_record(num_layers: int, num_sizes: int) -> None:
    """Fails if a deep model on several GPUs ends after hours, when vLLM's record of captured all-reduces is full."""
    pieces = num_sizes * (2 * 2 * (num_layers - 2) + 2 * 2 + 1)
    paths = paths_of_ranks(num_layers, num_sizes)
    assert pieces + paths * (2 * num_layers + 1) < 65_536
    assert paths == 400 or pieces + (paths + 1) * (2 * num_layers + 1) > 60_000
    with pytest.raises(SettingsError, match=r"fewer graphs\.sizes"):
        paths_of_ranks(126, 200)
