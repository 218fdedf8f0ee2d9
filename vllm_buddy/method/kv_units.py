"""KV units: how the layers of a model share KV blocks, so that a path of k of L layers takes about k / L of the memory.

The layers are split into n classes of equally many layers. A KV block holds block_size tokens of n layers, one of each
class. A request gives the j-th layer of its path within a class *unit* j, and each unit has blocks of its own. So a
request takes as many units as its fullest class has layers, and k layers take k / n units if the path is spread evenly
over the classes. Which layers are in one class is chosen for the paths that are expected (`fit_classes`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_buddy.method.path import LayerPath, path_mask

_STARTS = 32  # random starts of the search for classes
_SEED = 0


@dataclass(frozen=True)
class KVUnits:
    """The classes of a model's layers.

    class_of: [num_layers], from 0 to num_classes - 1; every class has equally many layers.
    """

    class_of: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.class_of)

    @property
    def num_classes(self) -> int:
        """Layers of a KV block."""
        return max(self.class_of) + 1

    @property
    def num_units(self) -> int:
        """Units of a request at full depth."""
        return self.num_layers // self.num_classes

    @cached_property
    def home(self) -> tuple[int, ...]:
        """[num_layers], the unit of each layer in a request at full depth."""
        taken = [0] * self.num_classes
        home = []
        for of_class in self.class_of:
            home.append(taken[of_class])
            taken[of_class] += 1
        return tuple(home)

    def layers_at(self, unit: int) -> list[int]:
        """The layers whose home is `unit`, one of each class, in the order of the classes."""
        layers = [layer for layer, home in enumerate(self.home) if home == unit]
        return sorted(layers, key=self.class_of.__getitem__)


def fit_classes(paths: Sequence[LayerPath], num_layers: int, num_classes: int) -> KVUnits:
    """Choose classes over which the given paths are spread evenly.

    A local search over exchanges of two layers, from several random starts. The result depends on the arguments alone.

    paths: at least one; all count alike.

    Raises:
        ValueError: num_classes does not divide num_layers.
    """
    if num_layers % num_classes:
        raise ValueError(f"{num_classes} classes do not divide {num_layers} layers")
    if num_classes == 1:
        return KVUnits((0,) * num_layers)
    held = np.array([path_mask(path, num_layers) for path in paths], dtype=np.int64)
    rng = np.random.default_rng(_SEED)
    evenly = np.arange(num_layers) % num_classes
    starts = [evenly, *(rng.permutation(evenly) for _ in range(_STARTS - 1))]
    best = min((_improved(held, start, num_classes) for start in starts), key=lambda found: found[0])
    return KVUnits(tuple(best[1].tolist()))


def _improved(held: np.ndarray, classes: np.ndarray, num_classes: int) -> tuple[tuple[float, float], np.ndarray]:
    """Exchange layers of different classes, always the best pair, until no exchange helps: costs and classes.

    held: [num_paths, num_layers], 1 where the path holds the layer. classes: [num_layers].
    """
    classes = classes.copy()
    first, second = np.triu_indices(held.shape[1], 1)
    while True:
        counts = np.stack([held[:, classes == c].sum(axis=1) for c in range(num_classes)], axis=1)
        apart = classes[first] != classes[second]
        a, b = first[apart], second[apart]
        # [num_pairs, num_paths], what the class of the first layer loses to that of the second.
        moved = (held[:, a] - held[:, b]).T
        exchanged = np.broadcast_to(counts, (len(a), *counts.shape)).copy()
        pairs = np.arange(len(a))
        exchanged[pairs, :, classes[a]] -= moved
        exchanged[pairs, :, classes[b]] += moved
        costs = _costs(exchanged, held)
        now = _costs(counts[None], held)[0]
        best = np.lexsort((costs[:, 1], costs[:, 0]))[0]
        if tuple(costs[best]) >= tuple(now):
            return tuple(now.tolist()), classes
        classes[[a[best], b[best]]] = classes[[b[best], a[best]]]


def _costs(counts: np.ndarray, held: np.ndarray) -> np.ndarray:
    """[num_candidates, 2]: layers that units store beyond those of the paths, relative to these; then the unevenness,
    which tells apart candidates that store equally many.

    counts: [num_candidates, num_paths, num_classes], layers of each path in each class.
    """
    depths = held.sum(axis=1)
    stored = counts.max(axis=2) * counts.shape[2] / depths
    return np.stack([stored.sum(axis=1).round(9), (counts**2 / depths[:, None]).sum(axis=(1, 2)).round(9)], axis=1)
