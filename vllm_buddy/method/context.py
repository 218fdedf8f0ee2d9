"""The router's view of a request: a running mean over its tokens, updated in O(1) per token."""

from collections.abc import Sequence

import numpy as np


class Context:
    """Pooled first-layer state of the tokens seen so far, already multiplied by the first linear layer.

    The pooled Value states G of the paper are a mean over tokens of a function of the token id alone (the
    first layer's input is the embedding and V carries no position), so a sum of table rows is all the state
    there is. Sums are float64: adding tokens one by one or as one prompt differs by less than any score gap.

    table: [vocab_size, r], float32, one row per token id.
    """

    def __init__(self, table: np.ndarray) -> None:
        self._table = table
        self._sum = np.zeros(table.shape[1], dtype=np.float64)
        self.num_tokens = 0
        self.newest: int | None = None

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add the next tokens of the request, in order."""
        if len(token_ids) == 0:
            return
        if len(token_ids) == 1:  # most calls, when every token is routed; the same sum for a fifth of the time
            self._sum += self._table[token_ids[0]]
        else:
            self._sum += self._table[np.asarray(token_ids)].sum(axis=0, dtype=np.float64)
        self.num_tokens += len(token_ids)
        self.newest = int(token_ids[-1])

    @property
    def mean(self) -> np.ndarray:
        """[r], float64. Defined once a token has been added."""
        return self._sum / self.num_tokens
