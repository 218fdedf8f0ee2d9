"""Compares budgets that are chosen per request with constant budgets and with the best choice, by loss and layers.

A constant budget between two depths is a mixture of both. Choices are compared with the best mixture of any two depths.
Otherwise a curve of constant budgets that is not convex would make choosing look better than it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

USUAL_PRICE, NUM_PRICES = 20.0, 2001  # nats per token for all layers; below it, at which the best choices are made


@dataclass(frozen=True)
class Gain:
    """A comparison of choices at their mean number of layers. Losses are means over samples, in nats per token.

    layers, loss: of the choices. constant: loss of the best constant budget with as many layers on average.
    best: loss of the best choice with as many layers on average, made with the losses of these samples known.
    stderr: standard error of constant - loss; it includes the variation of `layers` over samples.
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
        """The gain as a share of the gain of the best choice; NaN if the best choice gains nothing."""
        between = self.constant - self.best
        return self.gain / between if between > 1e-9 else float("nan")


def choices(excess: np.ndarray, depths: Sequence[int], num_layers: int, price: float) -> np.ndarray:
    """Return the index of the depth with the least cost at `price`, for each row of excess: [num_samples].

    excess: [num_samples, len(depths)], nats per token. Of depths with equal costs the greatest is chosen, as in
    FoldedPredictor.depth.
    """
    costs = excess + price * np.asarray(depths) / num_layers
    return len(depths) - 1 - costs[:, ::-1].argmin(axis=1)


def compare(losses: np.ndarray, depths: Sequence[int], chosen: np.ndarray, best: "Hindsight | None" = None) -> Gain:
    """Compare chosen depths with constant budgets and with the best choice.

    losses: [num_samples, len(depths)]; depths: ascending; chosen: [num_samples], indices of depths.
    best: `Hindsight.of(losses, depths)`, if it is computed already.
    """
    rows = np.arange(len(losses))
    layers, own = np.asarray(depths, dtype=np.float64)[chosen], losses[rows, chosen]
    mean_layers = float(layers.mean())
    low, high, share = _best_mixture(losses.mean(axis=0), np.asarray(depths, dtype=np.float64), mean_layers)
    constant = (1 - share) * losses[:, low] + share * losses[:, high]
    slope = 0.0
    if low != high:
        slope = float((losses[:, high] - losses[:, low]).mean() / (depths[high] - depths[low]))
    # Delta method: the constant budget is taken at the mean number of layers, which varies with the samples too.
    influence = constant - own + slope * (layers - mean_layers)
    stderr = float(influence.std(ddof=1) / np.sqrt(len(losses)))
    least = (best or Hindsight.of(losses, depths)).loss(mean_layers)
    return Gain(mean_layers, float(own.mean()), float(constant.mean()), least, stderr)


@dataclass(frozen=True)
class Hindsight:
    """The least mean loss of any choice, as a function of its mean number of layers, if samples could be divided.

    The best choices at all prices are the corners of a convex curve; between two corners a mixture of both is best.
    """

    layers: list[float]
    losses: list[float]

    @classmethod
    def of(cls, losses: np.ndarray, depths: Sequence[int]) -> "Hindsight":
        """Compute the curve. losses, depths: as in `compare`."""
        rows, points = np.arange(len(losses)), {}
        # Up to the one at which no sample is worth another layer, which few samples make high.
        steepest = float((-np.diff(losses, axis=1) / np.diff(depths)).max(initial=0.0)) * max(depths)
        beyond = np.geomspace(USUAL_PRICE, max(USUAL_PRICE, steepest), NUM_PRICES)
        for price in (*np.linspace(0.0, USUAL_PRICE, NUM_PRICES), *beyond):
            chosen = choices(losses, depths, max(depths), price)
            points[float(np.asarray(depths)[chosen].mean())] = float(losses[rows, chosen].mean())
        points[float(min(depths))] = float(losses[:, 0].mean())  # whatever the price
        layers = sorted(points)
        return cls(layers, [points[at] for at in layers])

    def loss(self, layers: float) -> float:
        """Return the least mean loss at this mean number of layers."""
        return float(np.interp(layers, self.layers, self.losses))


def _best_mixture(means: np.ndarray, layers: np.ndarray, at: float) -> tuple[int, int, float]:
    """Return (low, high, share of high): indices of the two depths whose mixture to `at` layers has the least loss."""
    best = None
    for low in np.flatnonzero(layers <= at + 1e-9):
        for high in np.flatnonzero(layers >= at - 1e-9):
            share = 0.0 if layers[high] == layers[low] else (at - layers[low]) / (layers[high] - layers[low])
            mean = (1 - share) * means[low] + share * means[high]
            if best is None or mean < best[0]:
                best = (mean, int(low), int(high), float(share))
    assert best is not None, f"{at} layers are beyond {layers}"
    return best[1:]
