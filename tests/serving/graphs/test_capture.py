"""Capturing CUDA graphs, with a device that is played."""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_buddy.serving.graphs import capture as module
from vllm_buddy.serving.graphs.capture import CudaCapture, OutOfGraphMemory

MIB = 1 << 20


class Device:
    """torch.cuda as far as captures use it. free, cached: MiB. fails: what ending a capture raises, if anything."""

    def __init__(self, free: int, cached: int = 0) -> None:
        self.free, self.cached = free, cached
        self.fails: Exception | None = None
        self.log: list[str] = []

    def mem_get_info(self, _: torch.device) -> tuple[int, int]:
        return self.free * MIB, 1000 * MIB

    def empty_cache(self) -> None:
        self.log.append("emptied")
        self.free, self.cached = self.free + self.cached, 0

    def synchronize(self, _: torch.device) -> None: ...

    def Stream(self, _: torch.device) -> str:
        return "stream"

    @contextmanager
    def stream(self, _: str) -> Any:
        yield

    def CUDAGraph(self) -> Any:
        def end() -> None:
            if self.fails is not None:
                raise self.fails

        return SimpleNamespace(capture_begin=lambda **_: None, capture_end=end, replay=lambda: "replayed")


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[CudaCapture, Device]]:
    """What captures on a device with so many MiB free and cached, on one rank or beside one with `other` MiB free."""

    def made(free: int, cached: int = 0, other: int | None = None) -> tuple[CudaCapture, Device]:
        def all_reduce(tensor: torch.Tensor, op: Any, group: Any) -> None:
            if op == torch.distributed.ReduceOp.MIN:
                tensor.clamp_(max=(other or 0) * MIB)

        device = Device(free, cached)
        group = SimpleNamespace(
            world_size=1 if other is None else 2, cpu_group=None, graph_capture=lambda _: nullcontext()
        )
        distributed = SimpleNamespace(all_reduce=all_reduce, ReduceOp=torch.distributed.ReduceOp)
        played = SimpleNamespace(
            cuda=device, zeros=lambda *_, **__: torch.zeros(1), tensor=torch.tensor, int64=torch.int64
        )
        played.distributed = distributed
        monkeypatch.setattr(module, "torch", played)
        monkeypatch.setattr(module, "set_graph_pool_id", lambda _: None)
        monkeypatch.setattr(module, "get_tp_group", lambda: group)
        monkeypatch.setattr(module, "current_platform", SimpleNamespace(get_global_graph_pool=lambda: "pool"))
        return CudaCapture(torch.device("cpu")), device

    return made


Make = Callable[..., tuple[CudaCapture, Device]]


def test_a_capture_begins_with_what_torch_holds_unused(make: Make) -> None:
    """Fails if a path cannot be captured because prompts of other lengths have left memory that nobody uses."""
    capture, device = make(free=10, cached=500)
    (replay,), taken = capture([lambda: None])
    assert replay() == "replayed"
    assert taken == 0
    assert device.log == ["emptied"]
    capture([lambda: None])
    assert device.log == ["emptied"], "memory that is free is left alone"


@pytest.mark.parametrize(("free", "other"), [(10, None), (500, 10), (10, 500)])
def test_a_full_device_captures_nothing_on_any_rank(make: Make, free: int, other: int | None) -> None:
    """Fails if one full rank ends the server, or a rank captures what another one does not."""
    capture, _ = make(free, other=other)
    ran: list[int] = []
    with pytest.raises(OutOfGraphMemory, match=r"10 MiB of device memory are free, 64 are needed"):
        capture([lambda: ran.append(1)])
    assert not ran


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")]
)
def test_memory_that_lacks_during_a_capture_is_told_as_such(make: Make, error: Exception) -> None:
    """Fails if the driver's refusal to make a graph, which is no torch.OutOfMemoryError, ends the engine."""
    capture, device = make(free=500)
    device.fails = error
    with pytest.raises(OutOfGraphMemory, match="out of memory"):
        capture([lambda: None])
    device.fails = RuntimeError("operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match="not permitted"):
        capture([lambda: None])


def test_what_a_warm_up_allocates_is_given_back_before_the_captures(make: Make) -> None:
    """Fails if memory of the warm-up is kept for a stream that never uses it, and counts as taken by graphs."""
    capture, device = make(free=500)

    def body() -> None:
        if not device.log:
            device.free, device.cached = device.free - 100, 100
        device.log.append("ran")

    _, taken = capture([body], warm_up=True)
    assert device.log == ["ran", "emptied", "ran"]
    assert taken == 0
