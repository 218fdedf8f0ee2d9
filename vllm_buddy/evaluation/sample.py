"""The unit of evaluation: a token sequence whose first tokens decide the path and whose other tokens are scored."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A sequence to score. No path depends on the tokens that are scored on it.

    num_context: number of leading tokens, at least one, that decide the first path, like a prompt, and are not scored.
        The tokens after them run under re-routing, like decoded tokens.
    """

    token_ids: Sequence[int]
    num_context: int

    def __post_init__(self) -> None:
        if not 0 < self.num_context < len(self.token_ids):
            raise ValueError(f"{self.num_context} context tokens of {len(self.token_ids)} leave nothing to score")

    @property
    def inputs(self) -> Sequence[int]:
        """The tokens that are run: all but the last, after which nothing is predicted."""
        return self.token_ids[:-1]

    @property
    def targets(self) -> Sequence[int]:
        """The tokens that are scored; the first is predicted by the last token of the context."""
        return self.token_ids[self.num_context :]
