"""Time on the GPU of one launch, without what the host needs for it: CUDA graphs between CUDA events.

A graph goes round several working sets, in sum several times the L2 cache, so that what an op reads comes from memory,
as weights do in serving. Ops of less than ROTATED_BYTES / MAX_SETS find their inputs in the cache, as in serving, too,
where the kernel before them has just written them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm_buddy_kernels.triton_import import triton

ROTATED_BYTES = 192 * 2**20  # an H100's L2 holds 50 MB
MAX_SETS = 256
TARGET_US = 2000  # of one replay
WARM_UPS = 3
COPIED_BYTES = 512 * 2**20


@triton.jit
def nothing_kernel(p_any):  # type: ignore[no-untyped-def]
    pass


def num_sets(num_bytes: int) -> int:
    """Working sets of an op that moves `num_bytes`."""
    return max(1, min(MAX_SETS, -(-ROTATED_BYTES // num_bytes)))


def num_launches(sets: int, us: float) -> int:
    """Of one replay: whole turns round the sets, about TARGET_US of them."""
    return sets * max(1, round(TARGET_US / (us * sets)))


class Timed:
    """Launches that are timed together. captured: False is for what waits for the device, and is run by the host."""

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
        """Microseconds per launch, of one replay."""
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
    """One large copy; it reads and writes COPIED_BYTES each."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return [lambda: target.copy_(source)]


def empty_launches() -> list[Callable[[], Any]]:
    """A kernel of one program that does nothing: no launch in a graph takes less."""
    anything = torch.empty(1, device="cuda")
    return [lambda: nothing_kernel[(1,)](anything)]
