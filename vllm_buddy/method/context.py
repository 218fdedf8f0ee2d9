"""The context: a running mean over the tokens of a request, which is the input of the router. O(1) per token."""

from collections.abc import Sequence

import numpy as np


class Context:
    """The pooled first-layer state of the tokens seen so far, multiplied by the router's first linear layer.

    The paper's pooled Value states G are a mean over tokens. Each token's V is a function of its token id alone: the
    first layer's input is the embedding, and V carries no position. A sum of table rows is therefore the whole state.
    Sums are float64, so adding tokens one by one or as one prompt differs by less than any gap between scores.

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
        if len(token_ids) == 1:  # most calls when every token is routed; the same sum in a fifth of the time
            self._sum += self._table[token_ids[0]]
        else:
            self._sum += self._table[np.asarray(token_ids)].sum(axis=0, dtype=np.float64)
        self.num_tokens += len(token_ids)
        self.newest = int(token_ids[-1])

    def copy(self) -> "Context":
        """The same state, which is extended apart from this one."""
        result = Context(self._table)
        result._sum, result.num_tokens, result.newest = self._sum.copy(), self.num_tokens, self.newest
        return result

    @property
    def mean(self) -> np.ndarray:
        """The mean of the table rows: [r], float64. Undefined before the first token."""
        return self._sum / self.num_tokens
