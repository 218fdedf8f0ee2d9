"""Captures functions as CUDA graphs; what replays a graph is a function without arguments."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from vllm.distributed.device_communicators.pynccl_allocator import set_graph_pool_id
from vllm.distributed.parallel_state import GraphCaptureContext, get_tp_group
from vllm.platforms import current_platform

Replay = Callable[[], Any]
_LEAST_FREE = 64 << 20  # bytes of the device for a capture: the driver keeps what it makes of a graph outside the pool


class OutOfGraphMemory(RuntimeError):
    """The device has no memory for what was to be captured."""


class Capture(Protocol):
    """Turns functions without arguments, which read and write persistent buffers only, into replays.

    Returns the replays and the device memory that they take, in bytes, the same on all tensor-parallel ranks.
    warm_up: whether to run each function once before it is captured. Raises OutOfGraphMemory.
    """

    def __call__(self, bodies: Sequence[Callable[[], None]], warm_up: bool = False) -> tuple[list[Replay], int]: ...


class CudaCapture:
    """Captures CUDA graphs, all into vLLM's memory pool, because no two are replayed at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = current_platform.get_global_graph_pool()
        # One for all captures: torch keeps a workspace of cuBLAS, and vLLM one of Marlin, for every stream that ever
        # multiplied matrices.
        self._stream = torch.cuda.Stream(device)
        self._keeps_pool = torch.cuda.CUDAGraph()  # torch does not capture into a pool whose graphs are all gone
        mark = torch.zeros(1, device=device)
        self._into(self._keeps_pool, mark.zero_)

    def __call__(self, bodies: Sequence[Callable[[], None]], warm_up: bool = False) -> tuple[list[Replay], int]:
        torch.cuda.synchronize(self._device)
        before = self._free_for_a_capture()
        group = get_tp_group()
        replays: list[Replay] = []
        try:
            with group.graph_capture(GraphCaptureContext(self._stream)):
                if warm_up:
                    # On this stream, because a first call allocates things for its stream, which a graph must not.
                    for body in bodies:
                        body()
                    # torch would keep the rest for this stream, and captures do not take from there.
                    torch.cuda.synchronize(self._device)
                    torch.cuda.empty_cache()
                for body in bodies:
                    graph = torch.cuda.CUDAGraph()
                    self._into(graph, body)
                    replays.append(graph.replay)
        except RuntimeError as error:  # torch.OutOfMemoryError, or the driver's torch.AcceleratorError
            # With several ranks the others have captured it.
            if "out of memory" not in str(error) or group.world_size > 1:
                raise
            raise OutOfGraphMemory(str(error)) from None
        torch.cuda.synchronize(self._device)
        taken = max(0, before - torch.cuda.mem_get_info(self._device)[0])
        # The largest over the ranks, which must drop the same graphs: capturing one takes all ranks.
        return replays, _over_ranks(taken, torch.distributed.ReduceOp.MAX)

    def _free_for_a_capture(self) -> int:
        """The free memory of the device, in bytes. If it is little, torch gives back what it holds unused.

        Raises:
            OutOfGraphMemory: one of the ranks has too little; raised by all of them.
        """
        for is_emptied in (False, True):
            if is_emptied:
                torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self._device)[0]
            least = _over_ranks(free, torch.distributed.ReduceOp.MIN)
            if least >= _LEAST_FREE:
                return free
        raise OutOfGraphMemory(f"{least >> 20} MiB of device memory are free, {_LEAST_FREE >> 20} are needed")

    def _into(self, graph: torch.cuda.CUDAGraph, body: Callable[[], Any]) -> None:
        """Not torch.cuda.graph, which collects garbage and empties the allocator's cache each time."""
        set_graph_pool_id(self._pool)  # asked for where NCCL's symmetric memory is used
        with torch.cuda.stream(self._stream):
            # thread_local: vLLM's other threads may wait for copies meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                body()
            except BaseException:
                with suppress(RuntimeError):  # the first error is the one to report
                    graph.capture_end()
                raise
            graph.capture_end()


def _over_ranks(num_bytes: int, op: Any) -> int:
    """The largest or smallest number over the tensor-parallel ranks. op: a torch.distributed.ReduceOp."""
    group = get_tp_group()
    if group.world_size == 1:
        return num_bytes
    reduced = torch.tensor(num_bytes, dtype=torch.int64)
    torch.distributed.all_reduce(reduced, op, group=group.cpu_group)
    return int(reduced)
