"""Which replica a request goes to, by depth and load."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_buddy.serving.admission.affinity import REMEMBERED, BudgetAffinity

loads_of_replicas = st.lists(st.integers(0, 100), min_size=1, max_size=6)
depths = st.lists(st.integers(3, 30), min_size=1, max_size=40)


def after(traffic: list[int], num_replicas: int, **options: int) -> BudgetAffinity:
    """A chooser that has seen these depths while nothing ran."""
    affinity = BudgetAffinity(**{"spill": 8} | options)
    for depth in traffic:
        affinity.choose(depth, [0] * num_replicas)
    return affinity


def mixed(counts: dict[int, int], seed: int = 0) -> list[int]:
    """This many requests of each depth, in some order."""
    traffic = [depth for depth, count in counts.items() for _ in range(count)]
    random.Random(seed).shuffle(traffic)
    return traffic


@pytest.mark.parametrize(
    ("counts", "num_replicas", "homes"),
    [
        ({15: 50, 30: 50}, 2, {15: [0], 30: [1]}),
        ({15: 62, 30: 38}, 2, {15: [0], 30: [1]}),  # as many users of each, who get answers faster at 15
        ({15: 75, 30: 25}, 2, {15: [0, 1], 30: [1]}),
        ({15: 25, 22: 25, 26: 25, 30: 25}, 2, {15: [0], 22: [0], 26: [1], 30: [1]}),
        ({15: 25, 22: 25, 26: 25, 30: 25}, 4, {15: [0], 22: [1], 26: [2], 30: [3]}),
        ({15: 50, 30: 50}, 5, {15: [0, 1, 2], 30: [2, 3, 4]}),
        ({15: 5, 30: 95}, 2, {15: [0], 30: [0, 1]}),
        ({30: 10}, 3, {30: [0, 1, 2]}),
        ({15: 50, 30: 50}, 1, {15: [0], 30: [0]}),
    ],
)
def test_a_depth_has_the_replicas_of_its_share(
    counts: dict[int, int], num_replicas: int, homes: dict[int, list[int]]
) -> None:
    """Fails if ranges are not sized by the traffic, or a small excess mixes two depths on a replica."""
    affinity = after(mixed(counts), num_replicas)
    assert {depth: affinity.home(depth, num_replicas) for depth in counts} == homes


def test_depths_do_not_meet_while_replicas_are_equally_loaded() -> None:
    """Fails if affinity gives way without need: one deep request makes each step of a shallow batch a deep one."""
    affinity = after(mixed({15: 50, 30: 50}), 2)
    chosen = [(depth, affinity.choose(depth, [9, 9])) for depth in mixed({15: 50, 30: 50}, seed=1)]
    assert Counter(chosen) == {(15, 0): 50, (30, 1): 50}


def test_one_depth_is_spread_evenly() -> None:
    """Fails if traffic of one budget does not use all replicas, or an idle server always uses the first."""
    affinity = BudgetAffinity(spill=8)
    loads = [0, 0, 0]
    for _ in range(90):
        loads[affinity.choose(22, loads)] += 1
    assert loads == [30, 30, 30]
    assert {affinity.choose(22, [0, 0, 0]) for _ in range(3)} == {0, 1, 2}


@pytest.mark.parametrize(("home", "other", "chosen"), [(8, 0, 0), (9, 0, 1), (28, 10, 0), (29, 10, 1)])
def test_a_busy_home_spills_to_the_least_loaded(home: int, other: int, chosen: int) -> None:
    """Fails if a replica idles while another has a queue, or a faster replica with fewer requests takes deep ones."""
    assert after(mixed({15: 50, 30: 50}), 2).choose(15, [home, other]) == chosen


def test_old_traffic_is_forgotten() -> None:
    """Fails if homes follow what the server saw a day ago."""
    affinity = after([15] * 500 + [30] * 2 * REMEMBERED, 2)
    assert affinity.home(30, 2) == [0, 1]


@given(depths, loads_of_replicas, st.integers(0, 10))
def test_every_replica_belongs_to_a_depth(traffic: list[int], loads: list[int], spill: int) -> None:
    """Fails if a depth has no home, or a replica is in none: it would have work only when others spill."""
    affinity = after(traffic, len(loads), spill=spill)
    homes = [affinity.home(depth, len(loads)) for depth in sorted(set(traffic))]
    assert all(homes)
    assert homes == sorted(homes)
    assert {replica for home in homes for replica in home} == set(range(len(loads)))
    if len(homes) == 1:
        assert homes == [list(range(len(loads)))]
    chosen = affinity.choose(traffic[0], loads)
    assert loads[chosen] <= max(spill + 2 * min(loads), min(loads))
