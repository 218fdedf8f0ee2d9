"""vLLM's drafter of n-grams, as the lossless drafter sets it up."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_buddy.serving.worker.depth_drafts import _ngram_proposer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3], [4, 5, 6, 7]),  # three tokens again, and what followed them
        ([1, 2, 3, 8, 2, 3, 9, 5, 1, 2, 3], [8, 2, 3, 9]),  # the longest n-gram, not the newest
        ([6, 1, 2, 3, 4, 5, 7, 8, 9, 9, 6, 1, 2, 3, 4, 5], [7, 8, 9, 9]),  # longer than the longest that is looked up
        ([3, 4, 5, 6, 3], []),  # one token again is below the shortest
        ([1, 2, 3, 4, 5], []),
    ],
)
def test_ngrams_are_looked_up_within_the_lengths_of_the_settings(
    numba: None, text: list[int], expected: list[int]
) -> None:
    """Fails if drafts.ngram_min or ngram_max does not reach vLLM's drafter, or its own configuration is changed."""
    config: Any = SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=4, prompt_lookup_min=0, prompt_lookup_max=0),
        model_config=SimpleNamespace(max_model_len=64),
        scheduler_config=SimpleNamespace(max_num_seqs=2),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    assert _ngram_proposer(config, 2, 0) is None
    proposer = _ngram_proposer(config, 2, 4)
    assert (proposer.min_n, proposer.max_n) == (2, 4)
    assert (config.speculative_config.prompt_lookup_min, config.speculative_config.prompt_lookup_max) == (0, 0)
    token_ids = np.zeros((1, 64), dtype=np.int32)
    token_ids[0, : len(text)] = text
    found = proposer.propose(4, [[text[-1]]], np.array([len(text)], dtype=np.int32), token_ids)
    assert found == [expected]
