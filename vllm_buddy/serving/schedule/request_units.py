"""Which KV units a request takes, as its path is decided (see method/kv_units.py)."""

from collections.abc import Sequence

from vllm_buddy.method import LayerPath, Route, full_path, layers_of
from vllm_buddy.method.kv_units import KVUnits
from vllm_buddy.serving.schedule.plan import LayerPlaces


class RequestUnits:
    """The units of one request. A layer gets its unit when a path first holds it, and keeps it.

    The layers of the first path get units from the first block on. A layer that is taken up later begins in the block
    of the first token that runs it, which no other request shares: blocks are shared only as long as all tokens ran
    the first path. A unit that only such layers use has no blocks before that one.

    first_blocks: for each unit the request takes, the first block that it needs.
    num_shared: how many units, from the first on, the first path takes; the others are never published.
    held: the layers that have a unit.
    """

    def __init__(self, units: KVUnits, route: Route, block_size: int) -> None:
        self._units, self._route, self._block_size = units, route, block_size
        self._full = full_path(units.num_layers)
        self._unit = [-1] * units.num_layers
        self._first_block = [0] * units.num_layers
        self._taken = [0] * units.num_classes  # units that layers of each class have
        self._decided = 0  # tokens whose paths were looked at
        self.first_blocks: list[int] = []
        self.held: LayerPath = 0
        self._take(route.first_path, 0)
        self.num_shared = len(self.first_blocks)

    def advance(self, num_tokens: int, token_ids: Sequence[int]) -> None:
        """Decide the paths of the first num_tokens tokens, and take the units that they need. See Route.decide."""
        if num_tokens <= self._decided or self.held == self._full:
            return
        self._route.decide(num_tokens, token_ids)
        if self._route.uniform_length is not None:
            position = self._decided
            for run in self._route.runs(position, num_tokens - position, token_ids):
                self._take(run.path, position // self._block_size)
                position += run.num_tokens
        self._decided = num_tokens

    def layer_places(self) -> LayerPlaces:
        """Where the layers lie that have a unit."""
        return LayerPlaces(tuple(self._unit), tuple(self._first_block))

    def _take(self, path: LayerPath, block: int) -> None:
        for layer in layers_of(path & ~self.held):
            of_class = self._units.class_of[layer]
            unit = self._taken[of_class]
            self._taken[of_class] += 1
            self._unit[layer], self._first_block[layer] = unit, block
            if unit == len(self.first_blocks):
                self.first_blocks.append(block)
        self.held |= path
