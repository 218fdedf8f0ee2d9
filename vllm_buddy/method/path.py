"""Paths: the set of layers that a token executes, stored as an integer whose bit l stands for layer l."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

import numpy as np

LayerPath: TypeAlias = int


def path_of(layers: Iterable[int]) -> LayerPath:
    """Return the path that executes `layers`."""
    path = 0
    for layer in layers:
        path |= 1 << int(layer)  # a numpy integer has 64 bits
    return path


def layers_of(path: LayerPath) -> list[int]:
    """Return the layers of `path` in ascending order."""
    return [layer for layer in range(path.bit_length()) if path >> layer & 1]


def gaps_of(path: LayerPath) -> list[range]:
    """Return the gaps of `path`, ascending: the longest ranges of layers that it skips one after the other."""
    layers = layers_of(path)
    return [range(before + 1, after) for before, after in pairwise(layers) if after > before + 1]


def gap_starts(path: LayerPath) -> tuple[int, ...]:
    """Return the first layer of each gap of `path`, ascending."""
    return tuple(gap.start for gap in gaps_of(path))


@lru_cache(maxsize=4096)
def path_mask(path: LayerPath, num_layers: int) -> np.ndarray:
    """Return which layers the path holds: [num_layers], bool. The array is cached, so do not write to it."""
    return np.array([path >> layer & 1 for layer in range(num_layers)], dtype=bool)


def full_path(num_layers: int) -> LayerPath:
    """Return the path of all layers, which the unrouted model runs."""
    return (1 << num_layers) - 1


def check_paths(paths: Iterable[LayerPath], num_layers: int) -> None:
    """Raise ValueError unless every path holds the first and the last of num_layers layers and none beyond it."""
    ends = 1 | 1 << num_layers - 1
    if any(path & ends != ends or path >> num_layers for path in paths):
        raise ValueError(f"every path must hold layers 0 and {num_layers - 1}, and none beyond")


def top_k_path(scores: Sequence[float] | np.ndarray, depth: int) -> LayerPath:
    """Return the path of the first layer, the last layer and the depth - 2 middle layers with the highest scores.

    scores: [num_layers - 2], one per middle layer. Ties go to the lower layer index, so the path depends on the scores
    alone.
    """
    path = 1 | 1 << len(scores) + 1
    for middle in (-np.asarray(scores)).argsort(kind="stable")[: depth - 2].tolist():
        path |= 2 << middle
    return path
