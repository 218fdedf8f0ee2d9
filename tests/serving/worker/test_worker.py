"""The GPU worker, as far as it goes without a GPU: what it takes from the KV cache, and when it captures."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu_worker import Worker

from vllm_buddy.errors import SettingsError, UnsupportedError
from vllm_buddy.serving.start.refusal_note import refusal_note
from vllm_buddy.serving.worker.worker import BuddyGPUWorker

AVAILABLE = 10 << 30
STATES = 4 * 8192 * 64 * 2  # of [8192 tokens, 64] in 16 bits


TABLES = 4 * 16 * 512 * 4  # of 16 requests of 8192 tokens in blocks of 16, for each unit


def worker(buddy: dict[str, Any], kv_cache_memory_bytes: int | None = None, num_units: int = 0) -> Any:
    made: Any = object.__new__(BuddyGPUWorker)
    made.cache_config = SimpleNamespace(kv_cache_memory_bytes=kv_cache_memory_bytes, num_gpu_blocks_override=None)
    made.cache_config.block_size = 16
    made.scheduler_config = SimpleNamespace(max_num_batched_tokens=8192, max_num_seqs=16)
    units = SimpleNamespace(num_units=num_units) if num_units else None
    made.model_config = SimpleNamespace(
        get_hidden_size=lambda: 64, dtype=torch.bfloat16, max_model_len=8192, buddy_kv_units=units
    )
    made.vllm_config = SimpleNamespace(additional_config={"buddy": buddy})
    return made


@pytest.mark.parametrize(
    ("buddy", "given", "left"),
    [
        ({"graphs": {"enabled": True, "memory_mib": 512}}, None, AVAILABLE - STATES - (512 << 20)),
        ({"graphs": {"enabled": False}}, None, AVAILABLE - STATES),
        ({"graphs": {"enabled": True}}, 1 << 30, AVAILABLE),
    ],
)
def test_the_kv_cache_leaves_room_for_graphs(
    monkeypatch: pytest.MonkeyPatch, buddy: dict[str, Any], given: int | None, left: int
) -> None:
    """Fails if capturing runs out of memory, or a size that the user gave is changed."""

    def available(self: Any) -> int:
        self.cache_config.kv_cache_memory_bytes = 1  # as a start-up plan of vLLM's does
        return AVAILABLE

    monkeypatch.setattr(Worker, "determine_available_memory", available)
    assert worker(buddy, given).determine_available_memory() == left


def test_the_kv_cache_leaves_room_for_the_block_tables_of_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if long contexts with KV units run out of memory, because each unit has block tables of its own."""
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: AVAILABLE)
    left = worker({"graphs": {"enabled": False}}, num_units=15).determine_available_memory()
    assert left == AVAILABLE - STATES - 15 * TABLES


@pytest.mark.parametrize("graphs", [{"enabled": True, "memory_mib": 11 << 10}, {"enabled": False}])
def test_a_size_of_graphs_that_leaves_no_kv_cache_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, graphs: dict[str, Any]
) -> None:
    """Fails if vLLM is handed a negative size, and ends with a message that names no setting of ours."""
    left = AVAILABLE if graphs["enabled"] else STATES - 1
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: left)
    with pytest.raises(SettingsError, match=r"no memory is left for the KV cache.*raise --gpu-memory-util") as caught:
        worker({"graphs": graphs}).determine_available_memory()
    assert ("graphs.memory_mib" in str(caught.value)) == graphs["enabled"]


@pytest.mark.parametrize(("available", "override"), [(-5, None), (0, None), (1, 100)])
def test_what_vllm_decides_itself_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch, available: int, override: int | None
) -> None:
    """Fails if weights that do not fit are blamed on graphs, or a number of blocks that the user gave is refused."""
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: available)
    made = worker({"graphs": {"enabled": True}})
    made.cache_config.num_gpu_blocks_override = override
    left = made.determine_available_memory()
    assert left == available if override is None else left < 0 < available


def test_weights_are_not_loaded_again() -> None:
    """Fails if compiled layers go on with weights, or memory, that vLLM has replaced."""
    assert hasattr(Worker, "reload_weights")
    with pytest.raises(UnsupportedError, match="restart the server"):
        worker({}).reload_weights()


def test_what_graphs_and_kernels_refuse_at_start_reaches_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a start that ends in capturing graphs says no more than that the engine did not start."""

    def refuses(backbone: Any) -> None:
        raise SettingsError("raise graphs.memory_mib")

    made = worker({})
    made.model_runner = SimpleNamespace(
        buddy_state=SimpleNamespace(start_serving=refuses), model=SimpleNamespace(model="the backbone")
    )
    with refusal_note() as note:
        with pytest.raises(SettingsError):
            made._maybe_activate_jit_monitor()
        assert note.read_text() == "raise graphs.memory_mib"


def test_graphs_are_captured_before_vllm_ends_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if our kernels are compiled after vLLM starts to hold compilations for errors, or if its method moved."""
    calls: list[str] = []
    monkeypatch.setattr(Worker, "_maybe_activate_jit_monitor", lambda self: calls.append("monitor"))
    made = worker({})
    made.model_runner = SimpleNamespace(
        buddy_state=SimpleNamespace(start_serving=lambda backbone: calls.append(f"start serving {backbone}")),
        model=SimpleNamespace(model="the backbone"),
    )
    made._maybe_activate_jit_monitor()
    assert calls == ["start serving the backbone", "monitor"]
    assert "self._maybe_activate_jit_monitor()" in inspect.getsource(inspect.unwrap(Worker.compile_or_warm_up_model))
