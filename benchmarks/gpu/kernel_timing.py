"""Times a launch on the GPU without the host's part, with CUDA graphs between CUDA events.

A graph rotates through several working sets whose total size is several times the L2 cache, so an op reads its inputs
from memory, as weights are read in serving. Ops that move less than ROTATED_BYTES / MAX_SETS find their inputs in the
cache. So they do in serving, where the previous kernel has just written them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm_buddy_kernels.triton_import import triton

ROTATED_BYTES = 192 * 2**20  # an H100's L2 holds 50 MB
MAX_SETS = 256
TARGET_US = 2000  # microseconds of one replay
WARM_UPS = 3
COPIED_BYTES = 512 * 2**20


@triton.jit
def nothing_kernel(p_any):  # type: ignore[no-untyped-def]
    pass


def num_sets(num_bytes: int) -> int:
    """Return the number of working sets for an op that moves `num_bytes`."""
    return max(1, min(MAX_SETS, -(-ROTATED_BYTES // num_bytes)))


def num_launches(sets: int, us: float) -> int:
    """Return the launches of one replay: whole rotations through the sets that take about TARGET_US."""
    return sets * max(1, round(TARGET_US / (us * sets)))


class Timed:
    """Launches that are timed together. captured: False if a launch waits for the device; the host then launches it."""

    def __init__(self, launches: Sequence[Callable[[], Any]], captured: bool = True) -> None:
        for _ in range(WARM_UPS):
            launches[0]()
        estimate = self._elapsed_us(lambda: [launches[0]() for _ in range(WARM_UPS)]) / WARM_UPS
        self._count = num_launches(len(launches), estimate)
        self._outputs: list[Any] = []  # Each launch of a graph has outputs of its own, as in serving.
        self._graph = torch.cuda.CUDAGraph() if captured else None

        def run_all() -> None:
            for index in range(self._count):
                self._outputs.append(launches[index % len(launches)]())

        def run_eagerly() -> None:
            for index in range(self._count):
                launches[index % len(launches)]()

        self._run: Callable[[], Any] = run_eagerly
        if self._graph is not None:
            with torch.cuda.graph(self._graph):
                run_all()
            self._run = self._graph.replay
        self._run()

    def us(self) -> float:
        """Return the microseconds per launch of one replay."""
        return self._elapsed_us(self._run) / self._count

    @staticmethod
    def _elapsed_us(run: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def copy_launches() -> list[Callable[[], Any]]:
    """Return one large copy, which reads COPIED_BYTES and writes as many."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return [lambda: target.copy_(source)]


def empty_launches() -> list[Callable[[], Any]]:
    """Return a kernel of one program that does nothing: no launch in a graph takes less time."""
    anything = torch.empty(1, device="cuda")
    return [lambda: nothing_kernel[(1,)](anything)]
