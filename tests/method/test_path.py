"""Tests of paths as bit masks and of the top-k choice."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_buddy.method import full_path, layers_of, path_of, top_k_path
from vllm_buddy.method.path import gaps_of


@given(st.sets(st.integers(0, 200)))
def test_layers_and_path_are_inverse(layers: set[int]) -> None:
    """Fails if a path of a model with more than 63 layers overflows a machine integer."""
    assert layers_of(path_of(layers)) == sorted(layers)


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=80), st.data())
def test_path_has_exactly_the_depth_and_both_ends(scores: list[float], data: st.DataObject) -> None:
    """Fails if equal or infinite scores give a path of another depth, or one without the first or last layer."""
    depth = data.draw(st.integers(3, len(scores) + 2))
    path = top_k_path(scores, depth)
    assert path.bit_count() == depth
    assert path & 1
    assert path >> len(scores) + 1 == 1


def test_path_holds_the_highest_scores() -> None:
    """Fails if scores are assigned to layers shifted by one: the first score belongs to layer 1."""
    assert layers_of(top_k_path([0.0, 3.0, 1.0, 2.0], 4)) == [0, 2, 4, 5]


def test_ties_go_to_the_lower_layer() -> None:
    """Fails if an unstable sort breaks ties, so that two machines can generate different tokens."""
    assert layers_of(top_k_path([1.0, 1.0, 1.0, 1.0], 4)) == [0, 1, 2, 5]
    assert layers_of(top_k_path(np.zeros(40), 22)) == [*range(21), 41]
    assert layers_of(top_k_path([0.0, 1.0, 0.0, 1.0, -0.0], 5)) == [0, 1, 2, 4, 6]


@given(st.sets(st.integers(1, 30)))
def test_gaps_are_the_skipped_layers_between_those_that_run(middle: set[int]) -> None:
    """Fails if a skipped layer is in no gap or in two, or layers that run lie in one or do not part two."""
    path = path_of({0, 31} | middle)
    gaps = gaps_of(path)
    assert [layer for gap in gaps for layer in gap] == sorted(set(range(32)) - set(layers_of(path)))
    assert all(path >> gap.start - 1 & 1 and path >> gap.stop & 1 for gap in gaps)


def test_full_depth_is_the_full_path() -> None:
    """Fails if budget 1.0 leaves a layer out."""
    assert top_k_path(np.arange(6), 8) == full_path(8) == 0b11111111
