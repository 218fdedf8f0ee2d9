"""Captured graphs by key, the least recently used dropped first; and how graphs are captured."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from vllm.distributed.parallel_state import GraphCaptureContext, get_tp_group
from vllm.platforms import current_platform

Replay = Callable[[], Any]


class OutOfGraphMemory(RuntimeError):
    """The device has no memory for what was to be captured."""


class Capture(Protocol):
    """From functions without arguments, which read and write persistent buffers only, to what replays them.

    Returns with them the device memory that they take, in bytes, the same on all tensor-parallel ranks.
    warm_up: run each once before.
    Raises OutOfGraphMemory.
    """

    def __call__(self, bodies: Sequence[Callable[[], None]], warm_up: bool = False) -> tuple[list[Replay], int]: ...


class CudaCapture:
    """Captures CUDA graphs, all into vLLM's memory pool: they are never replayed at the same time."""

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
        before = torch.cuda.mem_get_info(self._device)[0]
        group = get_tp_group()
        replays: list[Replay] = []
        try:
            with group.graph_capture(GraphCaptureContext(self._stream)):
                # On this stream, since what a first call makes for its stream must not be made within a graph.
                for body in bodies if warm_up else ():
                    body()
                for body in bodies:
                    graph = torch.cuda.CUDAGraph()
                    self._into(graph, body)
                    replays.append(graph.replay)
        except torch.OutOfMemoryError as error:
            if group.world_size > 1:  # the other ranks have captured it
                raise
            raise OutOfGraphMemory(str(error)) from None
        torch.cuda.synchronize(self._device)
        return replays, self._most(max(0, before - torch.cuda.mem_get_info(self._device)[0]))

    def _into(self, graph: torch.cuda.CUDAGraph, body: Callable[[], Any]) -> None:
        """Not torch.cuda.graph, which collects garbage and empties the allocator's cache each time."""
        with torch.cuda.stream(self._stream):
            # thread_local: vLLM's other threads may wait for copies meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                body()
            except BaseException:
                with suppress(RuntimeError):  # the first error is the one to tell
                    graph.capture_end()
                raise
            graph.capture_end()

    def _most(self, num_bytes: int) -> int:
        """Over the ranks, which must drop the same graphs: to capture one takes all of them."""
        group = get_tp_group()
        if group.world_size == 1:
            return num_bytes
        most = torch.tensor(num_bytes, dtype=torch.int64)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
        return int(most)


class GraphCache:
    """Replays by key.

    limit: of the memory that they take together, in bytes.
    capture_after: how often a key must be asked for before it is worth capturing.
    captures_left: how many more may be captured, ever; None: any number.
    """

    _MOST_COUNTED = 1024

    def __init__(self, limit: int, capture_after: int) -> None:
        self.limit = limit
        self.captures_left: int | None = None
        self._capture_after = capture_after
        self._graphs: OrderedDict[Hashable, tuple[Replay, int]] = OrderedDict()
        self._asked: OrderedDict[Hashable, int] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def get(self, key: Hashable) -> Replay | None:
        """The graph of `key`, if there is one; it is the last to be dropped then."""
        if key not in self._graphs:
            return None
        self._graphs.move_to_end(key)
        return self._graphs[key][0]

    def recurs(self, key: Hashable) -> bool:
        """Count that `key` was asked for; whether that was often enough, and there is room for graphs at all."""
        if self.limit == 0 or self.captures_left == 0:
            return False
        self._asked[key] = self._asked.pop(key, 0) + 1
        if len(self._asked) > self._MOST_COUNTED:
            self._asked.popitem(last=False)
        return self._asked[key] >= self._capture_after

    def put(self, key: Hashable, replay: Replay, num_bytes: int) -> None:
        """Keep a graph, and drop others until all fit. One that does not fit alone is refused."""
        self._asked.pop(key, None)
        if self.captures_left is not None:
            self.captures_left -= 1
        if num_bytes > self.limit:
            self.refuse(key)
            return
        self._graphs[key] = replay, num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self.limit:
            _, (_, freed) = self._graphs.popitem(last=False)
            self.num_bytes -= freed

    def refuse(self, key: Hashable) -> None:
        """Let `key` not recur for long."""
        self._asked[key] = -self._MOST_COUNTED
