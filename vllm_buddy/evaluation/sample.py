"""What gets scored: tokens of which the first decide the path and the rest are predicted."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A sequence to score. A score never lets a path see the tokens being scored.

    num_context: leading tokens, at least one. They decide the first path, as a prompt would, and are not scored. The
        tokens behind them run under re-routing, as decoded tokens would.
    """

    token_ids: Sequence[int]
    num_context: int

    def __post_init__(self) -> None:
        if not 0 < self.num_context < len(self.token_ids):
            raise ValueError(f"{self.num_context} context tokens of {len(self.token_ids)} leave nothing to score")

    @property
    def inputs(self) -> Sequence[int]:
        """The tokens that run: all but the last, behind which nothing is predicted."""
        return self.token_ids[:-1]

    @property
    def targets(self) -> Sequence[int]:
        """The tokens that are scored; the first is predicted by the last token of the context."""
        return self.token_ids[self.num_context :]
