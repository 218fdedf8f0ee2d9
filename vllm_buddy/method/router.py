"""The router: chooses the path of a request from its context and its depth."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vllm_buddy.method.context import Context
from vllm_buddy.method.decision import FoldedDecision
from vllm_buddy.method.path import LayerPath, full_path, path_mask, top_k_path

OMEGA = 0.1  # weight of the standardised prior that is added to the trained scores (BUDDY, section 3.3)
_EPS = 1e-12  # of a prior that is the same for all layers


def standardised(prior: np.ndarray, omega: float = OMEGA) -> np.ndarray:
    """What the prior adds to the scores: omega * standardise(prior), [num_layers - 2], in the prior's dtype."""
    return omega * (prior - prior.mean()) / (prior.std() + _EPS)


class Router:
    """Adds the prior to the trained scores and chooses the path.

    s' = s + omega * standardise(prior). Without a library, the path holds the top-k middle layers of s'. With a
    library, it is the library's path of that depth whose layers have the highest sum of s'. The budget matters only
    through the depth.

    prior: [num_layers - 2], larger is more important.
    decision: None for an artifact that has only a prior; there is then one path per depth.
    library: the allowed paths of each depth; None allows every path.
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
        self._bias = standardised(np.asarray(prior, dtype=np.float64), omega)
        self._library: dict[int, tuple[list[LayerPath], np.ndarray]] | None = None
        if library is not None:
            self._library = {
                depth: (list(paths), np.array([path_mask(p, num_layers)[1:-1] for p in paths], dtype=np.float64))
                for depth, paths in library.items()
            }
        self._static: dict[int, LayerPath] = {}

    def new_context(self) -> Context | None:
        """Return an empty context for a new request, or None if there is no Decision Module to use one."""
        return None if self.decision is None else Context(self.decision.table_context)

    @property
    def depths(self) -> list[int] | None:
        """The depths below full depth that the library holds; None if every depth is allowed."""
        return None if self._library is None else sorted(self._library)

    def reachable(self, depths: Iterable[int]) -> LayerPath:
        """Return the layers of all paths that these depths can have, whatever the input.

        All layers of the model if any set of them may be chosen.
        """
        union = 0
        for depth in depths:
            if depth == self.num_layers or (self._library is None and self.decision is not None):
                return self.full
            if self._library is None:
                union |= self.path(None, depth)
            else:
                for path in self._library.get(depth, ([],))[0]:
                    union |= path
        return union

    def path(self, context: Context | None, depth: int) -> LayerPath:
        """Return the path of `depth` layers for the tokens in `context`. Deterministic."""
        if depth == self.num_layers:
            return self.full
        if self.decision is None and depth in self._static:
            return self._static[depth]
        path = self._pick(self._scores(context), depth, self.full)
        assert path is not None
        if self.decision is None:
            self._static[depth] = path
        return path

    def path_within(self, context: Context | None, depth: int, path: LayerPath) -> LayerPath | None:
        """Return the path of `depth` layers, fewer than `path` has, among those whose layers are all in `path`.

        None if the library has none. Deterministic.
        """
        return self._pick(self._scores(context), depth, path)

    def _scores(self, context: Context | None) -> np.ndarray:
        if self.decision is None:
            return self._bias
        assert context is not None
        return self.decision.scores(context) + self._bias

    def _pick(self, scores: np.ndarray, depth: int, within: LayerPath) -> LayerPath | None:
        if self._library is None:
            if within != self.full:
                scores = np.where(path_mask(within, self.num_layers)[1:-1], scores, -np.inf)
            return top_k_path(scores, depth)
        paths, members = self._library[depth]
        totals = members @ scores
        if within != self.full:
            totals = np.where([not path & ~within for path in paths], totals, -np.inf)
        best = int(np.argmax(totals))
        return None if totals[best] == -np.inf else paths[best]
