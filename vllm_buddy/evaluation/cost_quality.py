"""What choosing a budget per request is worth: loss against layers, beside constant budgets and beside the best choice.

A constant budget between two depths is a mixture of both; the best mixture of any two depths is what is compared with,
so a bent curve of constant budgets cannot make choosing look better than it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

HINDSIGHT_PRICES = np.linspace(0.0, 20.0, 2001)  # nats per token for all layers


@dataclass(frozen=True)
class Gain:
    """Choices compared at their own mean number of layers. Losses are means over samples, in nats per token.

    constant: of the best constant budget of that many layers. best: of the best choice of that many layers for these
    very samples, known from their losses. stderr: of constant - loss; of a layer more or less as well, by the slope.
    """

    layers: float
    loss: float
    constant: float
    best: float
    stderr: float

    @property
    def gain(self) -> float:
        """Nats per token that choosing saves."""
        return self.constant - self.loss

    @property
    def share_of_best(self) -> float:
        """How far from the constant budget to the best choice; NaN where there is nothing between them."""
        between = self.constant - self.best
        return self.gain / between if between > 1e-9 else float("nan")


def choices(excess: np.ndarray, depths: Sequence[int], num_layers: int, price: float) -> np.ndarray:
    """Index of the depth that costs least at `price` for each row of excess [num_samples, len(depths)].

    Of depths that cost the same the greatest, as in FoldedPredictor.depth.
    """
    costs = excess + price * np.asarray(depths) / num_layers
    return len(depths) - 1 - costs[:, ::-1].argmin(axis=1)


def compare(losses: np.ndarray, depths: Sequence[int], chosen: np.ndarray, best: "Hindsight | None" = None) -> Gain:
    """losses: [num_samples, len(depths)]; depths: ascending; chosen: [num_samples], indices of depths.

    best: `Hindsight.of(losses, depths)`, where that is there already.
    """
    rows = np.arange(len(losses))
    layers, own = np.asarray(depths, dtype=np.float64)[chosen], losses[rows, chosen]
    mean_layers = float(layers.mean())
    low, high, share = _best_mixture(losses.mean(axis=0), np.asarray(depths, dtype=np.float64), mean_layers)
    constant = (1 - share) * losses[:, low] + share * losses[:, high]
    slope = 0.0
    if low != high:
        slope = float((losses[:, high] - losses[:, low]).mean() / (depths[high] - depths[low]))
    # Delta method: the constant budget is taken at the mean of layers, which varies with the samples too.
    influence = constant - own + slope * (layers - mean_layers)
    stderr = float(influence.std(ddof=1) / np.sqrt(len(losses)))
    least = (best or Hindsight.of(losses, depths)).loss(mean_layers)
    return Gain(mean_layers, float(own.mean()), float(constant.mean()), least, stderr)


@dataclass(frozen=True)
class Hindsight:
    """The least mean loss that any choice has, by its mean layers; samples being divisible.

    The choices that prices lead to are corners of a convex curve; between two of them a mixture is best.
    """

    layers: list[float]
    losses: list[float]

    @classmethod
    def of(cls, losses: np.ndarray, depths: Sequence[int]) -> "Hindsight":
        """losses, depths: as for compare."""
        rows, points = np.arange(len(losses)), {}
        for price in HINDSIGHT_PRICES:
            chosen = choices(losses, depths, max(depths), price)
            points[float(np.asarray(depths)[chosen].mean())] = float(losses[rows, chosen].mean())
        layers = sorted(points)
        return cls(layers, [points[at] for at in layers])

    def loss(self, layers: float) -> float:
        """At this mean number of layers."""
        return float(np.interp(layers, self.layers, self.losses))


def _best_mixture(means: np.ndarray, layers: np.ndarray, at: float) -> tuple[int, int, float]:
    """(low, high, share of high): two of `layers` whose mixture has `at` layers and the least mean."""
    best = None
    for low in np.flatnonzero(layers <= at + 1e-9):
        for high in np.flatnonzero(layers >= at - 1e-9):
            share = 0.0 if layers[high] == layers[low] else (at - layers[low]) / (layers[high] - layers[low])
            mean = (1 - share) * means[low] + share * means[high]
            if best is None or mean < best[0]:
                best = (mean, int(low), int(high), float(share))
    assert best is not None, f"{at} layers are beyond {layers}"
    return best[1:]
