"""How far service objectives take budget "auto" down: to a greatest depth that all its requests share. Numbers only.

A step costs the union of its requests' paths, and the paths of most depths are nested, so that all rows wait for the
deepest one. A higher price leads requests to different depths: those below the deepest lose quality, and no time is
won. Under one ceiling, steps of the same length run more layers (docs/benchmarks.md, "Service objectives").
"""

from collections import deque
from collections.abc import Sequence

_RECENT = 64  # prompts


class DepthCeiling:
    """A ceiling on a scale from 0, where recent prompts run what they choose without load, to 1, the fewest layers.

    The scale is linear in layers, and begins at the greatest depth that one of the prompts that arrived last has
    chosen: a ceiling above that would change nothing.

    depth: the ceiling. depths: those that load may lead to, of the predictor's grid, ascending, at least one.
    """

    def __init__(self, depths: Sequence[int]) -> None:
        self.depth = depths[-1]
        self._depths = tuple(depths)
        self._recent: deque[int] = deque(maxlen=_RECENT)
        self._level = 0.0

    def add(self, depth: int) -> None:
        """Take in a prompt that has arrived. depth: what it chooses without load, one of `depths`."""
        self._recent.append(depth)
        self.follow(self._level)

    def follow(self, level: float) -> None:
        """Move the ceiling to a level in [0, 1]: to the depth that is nearest to what the level asks for.

        One late token therefore changes nothing. At 0 there is no ceiling.
        """
        self._level = level
        fewest, self.depth = self._depths[0], self._depths[-1]
        if level > 0:
            top = max(self._recent, default=self.depth)
            asked = top - level * (top - fewest)
            self.depth = min((depth for depth in self._depths if depth <= top), key=lambda d: (abs(d - asked), d))
