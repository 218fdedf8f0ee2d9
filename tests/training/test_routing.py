"""Which layers the sequences of training run."""

import numpy as np
import torch

from vllm_buddy.training.routing import FULL_PROMPTS, LibraryRouting

NUM_LAYERS, LENGTH = 6, 40
LIBRARY = {4: [[0, 1, 3, 5], [0, 2, 3, 5]]}


def masks(rows: int, **settings: float) -> np.ndarray:
    """The masks of sequences of four layers: [rows, LENGTH, NUM_LAYERS]."""
    routing = LibraryRouting(NUM_LAYERS, LIBRARY, interval=0, first_share=0.5, **settings)
    token_ids = torch.zeros(rows, LENGTH, dtype=torch.int64)
    return routing.route(token_ids, [4] * rows, np.random.default_rng(0)).masks.numpy()


def test_a_share_of_the_sequences_begins_with_a_full_prompt() -> None:
    """Fails if training sees other sequences than the requests whose prompts run at full depth."""
    rows = masks(400, full_prompt_share=0.25)
    depths = rows.sum(axis=2)
    ends = (depths == NUM_LAYERS).sum(axis=1)
    assert 60 < np.count_nonzero(ends) < 140
    for row, end in zip(rows, ends, strict=True):
        assert row[:end].all()  # the prompt, without a gap
        assert (row[end:] == row[-1]).all()  # then one path
        assert np.flatnonzero(row[-1]).tolist() in LIBRARY[4]
    few, most = (int(share * LENGTH) for share in FULL_PROMPTS)
    assert {few, most - 1} <= set(ends[ends > 0]) <= set(range(few, most))


def test_without_full_prompts_nothing_else_is_drawn() -> None:
    """Fails if an earlier run cannot be repeated."""
    assert (masks(50) == masks(50, full_prompt_share=0.0)).all()
    assert (masks(50).sum(axis=2) == 4).all()
