"""From a request's context and depth to its path."""

from collections.abc import Mapping, Sequence

import numpy as np

from vllm_buddy.method.context import Context
from vllm_buddy.method.decision import FoldedDecision
from vllm_buddy.method.path import LayerPath, full_path, top_k_path

OMEGA = 0.1  # weight of the standardised prior beside the trained scores (BUDDY, section 3.3)


class Router:
    """Fuses trained scores with the prior and picks the path.

    s' = s + omega * standardise(prior); the path is the top-k of s' (Router.path), or, with a library, the
    library's path of that depth whose layers have the highest sum of s'. The budget enters through the depth only.

    prior: [num_layers - 2], larger is more important.
    decision: None for an artifact that has only a prior; paths are then constant per depth.
    library: for each depth the paths allowed there; None allows any.
    """

    def __init__(
        self,
        num_layers: int,
        prior: np.ndarray,
        decision: FoldedDecision | None = None,
        omega: float = OMEGA,
        library: Mapping[int, Sequence[LayerPath]] | None = None,
    ) -> None:
        self.num_layers = num_layers
        self.full = full_path(num_layers)
        self.decision = decision
        prior = np.asarray(prior, dtype=np.float64)
        self._bias = omega * (prior - prior.mean()) / (prior.std() + 1e-12)
        self._library: dict[int, tuple[list[LayerPath], np.ndarray]] | None = None
        if library is not None:
            middle = np.arange(1, num_layers - 1)
            self._library = {
                depth: (list(paths), np.array([[p >> layer & 1 for layer in middle] for p in paths], dtype=np.float64))
                for depth, paths in library.items()
            }
        self._static: dict[int, LayerPath] = {}

    def new_context(self) -> Context | None:
        """An empty context for a new request, or None where no decision ever looks at one."""
        return None if self.decision is None else Context(self.decision.table_context)

    @property
    def depths(self) -> list[int] | None:
        """Depths below full that the library holds; None if every depth is allowed."""
        return None if self._library is None else sorted(self._library)

    def path(self, context: Context | None, depth: int) -> LayerPath:
        """The path of `depth` layers for the tokens in `context`. Deterministic."""
        if depth == self.num_layers:
            return self.full
        if self.decision is None:
            if depth not in self._static:
                self._static[depth] = self._pick(self._bias, depth)
            return self._static[depth]
        assert context is not None
        return self._pick(self.decision.scores(context) + self._bias, depth)

    def _pick(self, scores: np.ndarray, depth: int) -> LayerPath:
        if self._library is None:
            return top_k_path(scores, depth)
        paths, members = self._library[depth]
        return paths[int(np.argmax(members @ scores))]
