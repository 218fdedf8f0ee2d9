"""Which KV units a request takes as its path is decided, and how many blocks of each (see method/kv_units.py)."""

from collections.abc import Sequence

import numpy as np

from vllm_buddy.method import LayerPath, Route, layers_of
from vllm_buddy.method.kv_units import KVUnits
from vllm_buddy.method.path import path_mask
from vllm_buddy.serving.schedule.plan import LayerPlaces


class RequestUnits:
    """The units of one request. A layer gets its unit when a path first holds it, and keeps it.

    The layers of the first path get units from the first block on. A layer that is taken up later begins in the block
    of the first token that runs it, which no other request shares: blocks are shared only as long as all tokens ran
    the first path. A unit that only such layers use has no blocks before that one. A unit whose layers are all skipped
    from some token on needs no more blocks.

    first_blocks: for each unit the request takes, the first block that it needs.
    num_shared: how many units, from the first on, the first path takes; the others are never published.
    held: the layers that have a unit.
    """

    def __init__(self, units: KVUnits, route: Route, block_size: int) -> None:
        self._units, self._route, self._block_size = units, route, block_size
        self._unit = [-1] * units.num_layers
        self._first_block = [0] * units.num_layers
        self._taken = [0] * units.num_classes  # units that layers of each class have
        self._decided = 0  # tokens whose paths were looked at
        # [num_layers], tokens up to which the blocks of each layer are filled, counted from the start of its unit; None
        # while all tokens ran the first path.
        self._ends: np.ndarray | None = None
        self._blocks: list[int] = []  # that each unit needs for the decided tokens; empty while they are alike
        self.first_blocks: list[int] = []
        self.held: LayerPath = 0
        self._take(route.first_path, 0)
        self.num_shared = len(self.first_blocks)

    def advance(self, num_tokens: int, token_ids: Sequence[int]) -> None:
        """Decide the paths of the first num_tokens tokens, and take the units that they need. See Route.decide."""
        start = self._decided
        if num_tokens <= start:
            return
        self._route.decide(num_tokens, token_ids)
        self._decided = num_tokens
        if self._route.uniform_length is None:
            return
        if self._ends is None:
            self._ends = path_mask(self._route.first_path, self._units.num_layers) * start
        position = start
        for run in self._route.runs(start, num_tokens - start, token_ids):
            self._take(run.path, position // self._block_size)
            self._ends += path_mask(run.path, self._units.num_layers) * run.num_tokens
            position += run.num_tokens
        self._count_blocks()

    def num_blocks(self, num_tokens: int) -> list[int]:
        """Entries of each unit's block table that the first num_tokens tokens need, those before its first included."""
        most = -(-num_tokens // self._block_size)
        if not self._blocks:
            return [most] * len(self.first_blocks)
        return [min(most, needed) for needed in self._blocks]

    def lowered(self, position: int) -> None:
        """Take note that the route was lowered at a token whose path may have been looked at already."""
        if self._ends is not None:
            self._ends += max(0, self._decided - position)  # whatever path that token runs now
            self._count_blocks()

    def layer_places(self) -> LayerPlaces:
        """Where the layers lie that have a unit."""
        return LayerPlaces(tuple(self._unit), tuple(self._first_block))

    def _count_blocks(self) -> None:
        assert self._ends is not None
        self._blocks = [0] * len(self.first_blocks)
        for unit, end in zip(self._unit, self._ends.tolist()):
            if unit >= 0:
                self._blocks[unit] = max(self._blocks[unit], -(-end // self._block_size))

    def _take(self, path: LayerPath, block: int) -> None:
        for layer in layers_of(path & ~self.held):
            of_class = self._units.class_of[layer]
            unit = self._taken[of_class]
            self._taken[of_class] += 1
            self._unit[layer], self._first_block[layer] = unit, block
            if unit == len(self.first_blocks):
                self.first_blocks.append(block)
            if self._ends is not None:
                self._ends[layer] = block * self._block_size
        self.held |= path
