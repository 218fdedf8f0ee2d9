"""The rows of a model's head that a draft pass reads: all, or those of the tokens that are frequent in a text.

The head takes much of a pass of few layers. With the rows of frequent tokens alone a pass reads a part of it
(FR-Spec, arXiv 2502.14856). Other tokens are then never drafted: the whole model says them when it checks.
"""

from dataclasses import dataclass

import numpy as np
import torch


def frequent_tokens(counts: np.ndarray, num_tokens: int) -> np.ndarray:
    """Return the ids of the `num_tokens` most frequent tokens, ascending: [num_tokens], int64.

    counts: [vocab_size]. Among equals smaller ids come first, which tokenizers of merged pairs gave to frequent pairs.
    """
    return np.sort(np.argsort(-counts, kind="stable")[:num_tokens]).astype(np.int64)


@dataclass(frozen=True)
class DraftHead:
    """A head of some tokens.

    weight: [num_tokens, hidden_size]. tokens: [num_tokens], int64, the token of each row; None: row i is of token i.
    """

    weight: torch.Tensor
    tokens: torch.Tensor | None = None

    @classmethod
    def of(cls, weight: torch.Tensor, vocabulary: np.ndarray | None) -> "DraftHead":
        """The rows of the tokens `vocabulary` of a whole head, [vocab_size, hidden_size]; None: all."""
        if vocabulary is None:
            return cls(weight)
        tokens = torch.from_numpy(vocabulary).to(weight.device)
        return cls(weight.detach()[tokens], tokens)

    def rows_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rows of tokens, of any shape; -1 for a token that has none."""
        if self.tokens is None:
            return tokens
        rows = torch.searchsorted(self.tokens, tokens.contiguous()).clamp(max=len(self.tokens) - 1)
        return torch.where(self.tokens[rows] == tokens, rows, -1)

    def likeliest(self, normed: torch.Tensor) -> torch.Tensor:
        """The likeliest token after each state: [...], int64. normed: [..., hidden_size], after the last norm."""
        rows = torch.nn.functional.linear(normed, self.weight).argmax(dim=-1)
        return rows if self.tokens is None else self.tokens[rows]
