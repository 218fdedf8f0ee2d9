"""Tests of the path library that is made from a prior."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_buddy.importance import nested_library
from vllm_buddy.method import Router, path_of, top_k_path


@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 5))
def test_paths_are_few_close_and_nested(num_middle: int, paths_per_depth: int, seed: int) -> None:
    """Fails if the paths of a depth need more than one layer beyond it: a batch then reads many layers' weights."""
    prior = np.random.default_rng(seed).standard_normal(num_middle)
    library = nested_library(prior, paths_per_depth)
    assert list(library) == list(range(3, num_middle + 2))
    for depth, sets in library.items():
        assert len(sets) == min(paths_per_depth, depth - 1)
        assert len({tuple(layers) for layers in sets}) == len(sets)
        assert path_of(sets[0]) == top_k_path(prior, depth)
        above = set(np.flatnonzero([top_k_path(prior, depth + 1) >> i & 1 for i in range(num_middle + 2)]))
        for layers in sets:
            assert layers == sorted(layers)
            assert len(layers) == depth
            assert {0, num_middle + 1} <= set(layers) <= above


@pytest.mark.parametrize("depth", [3, 5, 7])
def test_prior_alone_picks_the_first(depth: int) -> None:
    """Fails if the prior alone chooses another path with the library than without it."""
    prior = np.array([0.3, 0.1, 0.9, 0.5, 0.2, 0.7])
    library = {d: [path_of(layers) for layers in sets] for d, sets in nested_library(prior, 3).items()}
    assert Router(8, prior, library=library).path(None, depth) == Router(8, prior).path(None, depth)
