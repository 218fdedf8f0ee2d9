"""The cache of captured graphs: what is captured, kept and dropped. No device."""

from vllm_buddy.serving.graphs.cache import MOST_GRAPHS, GraphCache


def replay() -> None:
    """Nothing."""


def test_a_key_recurs_after_so_many_times() -> None:
    """Fails if a path that occurs once is captured, or one that recurs never is."""
    cache = GraphCache(10, 3)
    assert [cache.recurs("a") for _ in range(4)] == [False, False, True, True]
    assert not cache.recurs("b")


def test_the_least_recently_used_go_first_and_the_limit_holds() -> None:
    """Fails if a graph in use is dropped before one that is not, or the limit is passed."""
    cache = GraphCache(10, 1)
    cache.put("a", replay, 4)
    cache.put("b", replay, 4)
    assert cache.get("a") is replay
    cache.put("c", replay, 4)
    assert "b" not in cache
    assert "a" in cache
    assert "c" in cache
    assert cache.num_bytes == 8
    cache.put("d", replay, 10)
    assert len(cache) == 1
    assert cache.num_bytes == 10
    assert cache.get("a") is None


def test_graphs_that_take_no_memory_of_their_own_are_bounded_in_number() -> None:
    """Fails if graphs that fit into memory already reserved, and so count as 0 bytes, are kept without end."""
    cache = GraphCache(10, 1, most_graphs=3)
    for key in "abcde":
        cache.put(key, replay, 0)
    assert len(cache) == 3
    assert [key in cache for key in "abcde"] == [False, False, True, True, True]
    assert len(GraphCache(10, 1)._graphs) == 0
    assert GraphCache(10, 1).most_graphs == MOST_GRAPHS


def test_a_graph_beyond_the_limit_is_not_kept_nor_captured_at_every_step() -> None:
    """Fails if a path too large for the limit is captured again and again, in the middle of serving."""
    cache = GraphCache(10, 3)
    cache.put("a", replay, 4)
    cache.put("large", replay, 11)
    assert "large" not in cache
    assert "a" in cache
    assert not any(cache.recurs("large") for _ in range(100))


def test_counts_of_ever_new_paths_are_bounded() -> None:
    """Fails if the host's memory grows with every path that was ever seen."""
    cache = GraphCache(10, 3)
    for number in range(5000):
        cache.recurs(number)
    assert len(cache._asked) <= 1024


def test_without_room_or_captures_left_nothing_recurs() -> None:
    """Fails if paths are captured for which there is no memory, or all-reduces of graphs fill vLLM's buffer."""
    assert not any(GraphCache(0, 1).recurs("a") for _ in range(10))
    cache = GraphCache(10, 1)
    cache.captures_left = 2
    for key in "abcd":
        if cache.recurs(key):
            cache.put(key, replay, 1)
    assert len(cache) == 2
    assert cache.get("a") is replay


def test_the_more_was_captured_the_oftener_a_key_must_recur() -> None:
    """Fails if batches of ever new mixes of paths spend the time of serving, or all captures that ranks have."""
    cache = GraphCache(1000, 3)
    for number in range(64):
        cache.put(number, replay, 1)
    assert [cache.recurs("a") for _ in range(9)] == [False] * 8 + [True]
