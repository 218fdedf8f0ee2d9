"""Searches the layers that draft: those with which the newest token best predicts what the whole model says.

A draft reads K and V of the whole model for the tokens before it. The search is that of `path_search.py` under this
condition, and goes on from a path that the artifact's bypass was trained for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vllm_buddy.artifact import Artifact
from vllm_buddy.baselines import static_path
from vllm_buddy.method import LayerPath, depth_for_budget, full_path, layers_of
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.draft_chains import draft_layer, full_states
from vllm_buddy.method.draft_head import DraftHead
from vllm_buddy.method.drafting import draft_gain, pass_cost
from vllm_buddy.training.objective import agreement
from vllm_buddy.training.path_search import RepairedPaths, search_removals

LONGEST_CHAIN = 4  # drafts in a row, in the prediction of what a depth gains


class DraftPaths(RepairedPaths):
    """Measures paths as first drafts after every position: one token runs the path, those before it all layers.

    vocabulary: the tokens that drafts choose among; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        token_ids: torch.Tensor,
        bypass: Bypass | None,
        vocabulary: np.ndarray | None = None,
    ) -> None:
        self._full = full_states(model, token_ids.to(next(model.parameters()).device))[1]
        super().__init__(model, token_ids, bypass)
        self._draft_head = DraftHead.of(self._head.weight, vocabulary)

    def agreement(self, skipped: set[int]) -> float:
        """Return the share of tokens after which the draft is what the full model says, both greedily."""
        hidden, said = self._model.model.norm(self._run(self._start, 0, skipped)), self._teacher[0][..., 0]
        return float(agreement(hidden, self._draft_head.weight, self._draft_head.rows_of(said)).mean())

    def _step(self, index: int, hidden: torch.Tensor, skip: bool) -> torch.Tensor:
        if skip:
            return super()._step(index, hidden, skip)
        return draft_layer(self._layers[index], hidden, self._rotary, self._full[index])[0]


@dataclass(frozen=True)
class DraftCandidate:
    """The best path of a depth, measured before it has an adapter.

    divergence: from the whole model, nats per token. agreement: the share of tokens after which both say the same,
    greedily. gain: predicted tokens per cost, over those without drafts.
    """

    depth: int
    path: LayerPath
    divergence: float
    agreement: float
    gain: float


def starting_path(artifact: Artifact, deepest: int) -> LayerPath:
    """The path from which layers are removed: the artifact's shallowest that was trained and has `deepest` layers.

    The whole model if the artifact has none.
    """
    num_layers, trained = artifact.config.base_model.num_layers, artifact.config.budgets
    if trained is None:
        return full_path(num_layers)
    smallest = max(deepest, depth_for_budget(trained[0], num_layers))
    known = [depth for depth in artifact.config.library or range(num_layers) if depth >= smallest]
    path = artifact.first_path(min(known)) if known else None
    return full_path(num_layers) if path is None else path


@torch.no_grad()
def search_drafts(
    model: nn.Module,
    token_ids: torch.Tensor,
    artifact: Artifact,
    depths: Sequence[int],
    row_cost: float,
    note: Callable[[str], None],
    vocabulary: np.ndarray | None = None,
) -> list[DraftCandidate]:
    """Return the best path that is found for each of `depths`, ascending. They are nested.

    token_ids: [num_sequences, length], the text that paths are compared on. row_cost: of checking one draft, see
    draft_gain. vocabulary: the tokens that drafts choose among; None: all.
    """
    num_layers, rank = artifact.config.base_model.num_layers, artifact.config.bypass_rank
    start = starting_path(artifact, max(depths))
    gone = [layer for layer in range(num_layers) if not start >> layer & 1]
    note(
        f"searching for draft paths from {num_layers - len(gone)} layers down to {min(depths)}, on "
        f"{token_ids.numel()} tokens"
    )
    paths = DraftPaths(model, token_ids, artifact.bypass, vocabulary)
    num_tokens = None if vocabulary is None else len(vocabulary)
    order = search_removals(paths, gone, min(depths), lambda *_: None)
    found = []
    for depth in sorted(depths):
        path = static_path(order, depth)
        skipped = set(range(num_layers)) - set(layers_of(path))
        right = paths.agreement(skipped)
        cost = pass_cost(model.config, depth, (num_layers - depth) * rank, num_tokens)
        chains = [[right**i for i in range(1, n + 1)] for n in range(1, LONGEST_CHAIN + 1)]
        gain = max(draft_gain(chain, cost, row_cost) for chain in chains)
        found.append(DraftCandidate(depth, path, paths.divergence(skipped), right, gain))
        note(
            f"  {depth} layers: {right:.1%} of the drafts are right, {found[-1].divergence:.3f} nats per token, "
            f"predicted gain {gain:.3f}"
        )
    return found
