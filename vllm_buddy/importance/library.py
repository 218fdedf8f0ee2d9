"""A short list of paths per depth, close to each other and nested across depths."""

from collections.abc import Sequence

import numpy as np

from vllm_buddy.method import layers_of, top_k_path
from vllm_buddy.method.budget import MIN_DEPTH


def nested_library(prior: Sequence[float] | np.ndarray, paths_per_depth: int) -> dict[int, list[list[int]]]:
    """Up to `paths_per_depth` paths for every depth below full: the prior's own first, then variants of it.

    Each path of depth d is the prior's path of depth d + 1 without one of its middle layers, the least important ones
    in turn. So all of a depth run inside d + 1 layers: a batch that mixes them, or mixes them with the next budget up,
    needs the weights of one more layer, not of all that they could disagree on.

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
