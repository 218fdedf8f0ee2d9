"""Tests that text which training has seen is not taken for new text."""

from pathlib import Path

import numpy as np

from benchmarks.quality.routing_worth import fresh_windows
from vllm_buddy.training.corpus import Corpus
from vllm_buddy.training.sources import DataSource


def corpus(windows: list[list[int]], order: list[int], starts: list[int]) -> Corpus:
    return Corpus(np.array(windows, dtype=np.int32), np.array(order, dtype=np.int64), np.array(starts), "", {})


def test_only_windows_that_training_did_not_use_are_returned() -> None:
    """Fails if gains are measured on training text, or on the part of a file that training may come to."""
    half, whole = [[1, 1], [2, 2]], [[5, 5], [6, 6], [7, 7]]
    seen = corpus([*half, *whole], [0, 2, 4], [0, 2, 5])
    every = corpus([*half, [3, 3], [4, 4], *whole[::-1]], [], [0, 4, 7])
    sources = [DataSource(file=Path("half.txt"), share=0.5), DataSource(file=Path("whole.json"))]
    found = fresh_windows([seen], every, sources)
    assert found["half.txt"].tolist() == [[3, 3], [4, 4]]
    assert found["whole.json"].tolist() == [[6, 6]]
    later = corpus(whole, [1], [0, 3])
    assert not len(fresh_windows([seen, later], every, sources)["whole.json"])
