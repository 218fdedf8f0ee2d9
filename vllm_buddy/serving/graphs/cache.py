"""Captured graphs by key, within bounds of memory and number; the least recently used is dropped first."""

from collections import OrderedDict
from collections.abc import Hashable

from vllm.logger import init_logger

from vllm_buddy.serving.graphs.capture import Replay

# Whatever their measured memory: a graph that fits into memory already reserved counts as 0 bytes, but the driver keeps
# a record of each of its nodes.
MOST_GRAPHS = 512
_EASY = 32  # captures after which a key must recur more often, and so on

logger = init_logger(f"vllm.{__name__}")


class GraphCache:
    """Replays by key.

    limit: of the memory that they take together, in bytes.
    capture_after: how often a key must be asked for before it is worth capturing, at first. Batches of ever new mixes
        of paths are worth none, so this grows with the number of captures: by as much again for each _EASY of them.
    most_graphs: how many are kept at most.
    captures_left: how many more may be captured in the life of the process; None: any number.
    """

    _MOST_COUNTED = 1024

    def __init__(self, limit: int, capture_after: int, most_graphs: int = MOST_GRAPHS) -> None:
        self.limit = limit
        self.most_graphs = most_graphs
        self.captures_left: int | None = None
        self.num_bytes = 0
        self._capture_after = capture_after
        self._num_captured = 0
        self._graphs: OrderedDict[Hashable, tuple[Replay, int]] = OrderedDict()
        self._asked: OrderedDict[Hashable, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def get(self, key: Hashable) -> Replay | None:
        """The graph of `key`, if there is one, which becomes the most recently used."""
        if key not in self._graphs:
            return None
        self._graphs.move_to_end(key)
        return self._graphs[key][0]

    def recurs(self, key: Hashable) -> bool:
        """Count that `key` was asked for; whether it is now worth capturing and there is room for graphs at all."""
        if self.limit == 0 or self.captures_left == 0:
            return False
        self._asked[key] = self._asked.pop(key, 0) + 1
        if len(self._asked) > self._MOST_COUNTED:
            self._asked.popitem(last=False)
        return self._asked[key] >= self._capture_after * (1 + self._num_captured // _EASY)

    def put(self, key: Hashable, replay: Replay, num_bytes: int) -> None:
        """Keep a graph, and drop others until all fit. One that does not fit alone is refused."""
        self._asked.pop(key, None)
        self._num_captured += 1
        if self.captures_left is not None:
            self.captures_left -= 1
            if self.captures_left == 0:
                logger.warning("vllm_buddy: no more CUDA graphs of whole paths are captured until the server restarts")
        if num_bytes > self.limit:
            self.refuse(key)
            return
        self._graphs[key] = replay, num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self.limit or len(self._graphs) > self.most_graphs:
            _, (_, freed) = self._graphs.popitem(last=False)
            self.num_bytes -= freed

    def refuse(self, key: Hashable) -> None:
        """Do not let `key` recur for a long time."""
        self._asked[key] = -self._MOST_COUNTED
