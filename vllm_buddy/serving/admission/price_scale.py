"""Which price of compute takes the prompts of late to a given mean depth. Numbers only, nothing of vLLM."""

from collections import deque
from collections.abc import Sequence

import numpy as np

_RECENT = 64  # prompts
_ABOVE = 1 + 1e-9  # at equal cost the greater depth is chosen, so that a price must be above its threshold


class PriceScale:
    """A scale of prices from 0, the price without load, to 1, at which all recent prompts run the fewest layers.

    It is linear in layers, not in price: at level u, recent prompts run calm - u * (calm - fewest) layers on average,
    or the next fewer there are, where calm is their mean without load. How dear layers must be for that depends on the
    prompts, so the scale is made of the prompts that arrived last.

    depths: those that load may lead to, of the predictor's grid, ascending. num_layers: of the model. base: the price
    without load.
    """

    def __init__(self, depths: Sequence[int], num_layers: int, base: float) -> None:
        self._depths = np.asarray(depths, np.float64)
        self._num_layers = num_layers
        self._base = base
        self._recent: deque[np.ndarray] = deque(maxlen=_RECENT)
        self._thresholds = np.zeros(0)
        self._means = np.zeros(0)
        self._calm = self._depths[-1]

    def add(self, excess: np.ndarray) -> None:
        """Take in a prompt that has arrived. excess: in nats, of each of `depths`; falls with depth."""
        self._recent.append(_thresholds(excess, self._depths, self._num_layers))
        thresholds = np.concatenate(self._recent)
        order = thresholds.argsort(kind="stable")
        self._thresholds = thresholds[order]
        layers = np.tile(np.diff(self._depths), len(self._recent))[order]
        self._means = self._depths[-1] - layers.cumsum() / len(self._recent)
        below = int(np.searchsorted(self._thresholds, self._base))
        self._calm = self._means[below - 1] if below else self._depths[-1]

    def price(self, level: float) -> float:
        """The least price at which recent prompts run what `level` asks for, from `base` up. level: in [0, 1]."""
        wanted = self._calm - level * (self._calm - self._depths[0])
        # Means fall along the thresholds. Rounding in the sum must not ask for one more.
        place = int(np.searchsorted(-self._means, -wanted - 1e-9))
        if level <= 0 or place >= len(self._thresholds):
            return self._base
        return max(self._base, float(self._thresholds[place]) * _ABOVE)


def _thresholds(excess: np.ndarray, depths: np.ndarray, num_layers: int) -> np.ndarray:
    """The prices above which a prompt runs at most depths[k], for all k but the last: [len(depths) - 1].

    Depth i costs less than the greater depth j from the price (excess_i - excess_j) * num_layers / (depths_j -
    depths_i) on. A depth of at most depths[k] is chosen if every greater one has such an i.
    """
    count = len(depths)
    result = np.zeros(count - 1)
    for k in range(count - 1):
        result[k] = max(
            min(
                (excess[i] - excess[j]) * num_layers / (depths[j] - depths[i]) if excess[i] > excess[j] else 0.0
                for i in range(k + 1)
            )
            for j in range(k + 1, count)
        )
    return result
