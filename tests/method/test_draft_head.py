"""The tokens that a draft pass chooses among."""

import numpy as np
import pytest
import torch

from vllm_buddy.method.draft_head import DraftHead, frequent_tokens


def test_the_frequent_tokens() -> None:
    """Fails if rare tokens are kept, or which of equals are kept depends on the sort."""
    counts = np.array([0.0, 5.0, 1.0, 0.0, 9.0, 1.0, 0.0])
    assert frequent_tokens(counts, 3).tolist() == [1, 2, 4]
    assert frequent_tokens(counts, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert frequent_tokens(np.zeros(1000), 10).tolist() == list(range(10))


@pytest.mark.parametrize("vocabulary", [None, np.array([1, 4, 5, 11])])
def test_the_likeliest_of_some_tokens(vocabulary: np.ndarray | None) -> None:
    """Fails if a token outside is drafted, or a row is taken for another token."""
    generator = torch.Generator().manual_seed(0)
    weight, normed = torch.randn(12, 8, generator=generator), torch.randn(3, 40, 8, generator=generator)
    head = DraftHead.of(weight, vocabulary)
    allowed = torch.arange(12) if vocabulary is None else torch.from_numpy(vocabulary)
    logits = normed @ weight.T
    masked = torch.full_like(logits, -torch.inf)
    masked[..., allowed] = logits[..., allowed]
    assert torch.equal(head.likeliest(normed), masked.argmax(dim=-1))
    rows = head.rows_of(torch.arange(12))
    assert [int(row) for row in rows if row >= 0] == list(range(len(allowed)))
    assert torch.equal(torch.nonzero(rows >= 0).flatten(), allowed)
