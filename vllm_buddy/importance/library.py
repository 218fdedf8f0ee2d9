"""Makes a path library from a prior: a few paths per depth, similar to each other and nested across depths."""

from collections.abc import Sequence

import numpy as np

from vllm_buddy.method import layers_of, top_k_path
from vllm_buddy.method.budget import MIN_DEPTH


def nested_library(prior: Sequence[float] | np.ndarray, paths_per_depth: int) -> dict[int, list[list[int]]]:
    """Return up to `paths_per_depth` paths for every depth below full: first the prior's own path, then variants of it.

    Each path of depth d is the prior's path of depth d + 1 without one middle layer; the variants leave out the least
    important layers in turn. All paths of depth d therefore lie within d + 1 layers. A batch that mixes them, alone or
    with requests of the next higher depth, reads the weights of only one more layer.

    prior: [num_layers - 2], larger is more important.
    """
    order = np.argsort(-np.asarray(prior), kind="stable")
    num_layers = len(order) + 2
    library = {}
    for depth in range(MIN_DEPTH, num_layers):
        above = layers_of(top_k_path(prior, depth + 1))
        dropped = [int(i) + 1 for i in order[: depth - 1][::-1][:paths_per_depth]]
        library[depth] = [[layer for layer in above if layer != drop] for drop in dropped]
    return library
