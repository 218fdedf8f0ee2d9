"""Paths: the set of layers a token executes, as an integer whose bit l stands for layer l."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np

LayerPath: TypeAlias = int


def path_of(layers: Iterable[int]) -> LayerPath:
    """The path that executes `layers`."""
    path = 0
    for layer in layers:
        path |= 1 << layer
    return path


def layers_of(path: LayerPath) -> list[int]:
    """The layers of `path`, ascending."""
    return [layer for layer in range(path.bit_length()) if path >> layer & 1]


@lru_cache(maxsize=4096)
def path_mask(path: LayerPath, num_layers: int) -> np.ndarray:
    """[num_layers], bool: does the path hold the layer? Not to be written to."""
    return np.array([path >> layer & 1 for layer in range(num_layers)], dtype=bool)


def full_path(num_layers: int) -> LayerPath:
    """The path of the unrouted model."""
    return (1 << num_layers) - 1


def top_k_path(scores: Sequence[float] | np.ndarray, depth: int) -> LayerPath:
    """First layer, last layer and the depth - 2 middle layers of highest score.

    scores: [num_layers - 2], one per middle layer. Ties go to the lower layer index, so the path is a
    function of the scores alone.
    """
    path = 1 | 1 << len(scores) + 1
    for middle in (-np.asarray(scores)).argsort(kind="stable")[: depth - 2].tolist():
        path |= 2 << middle
    return path
