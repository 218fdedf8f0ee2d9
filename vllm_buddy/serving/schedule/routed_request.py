"""What the scheduler keeps of a request."""

from dataclasses import dataclass

import numpy as np

from vllm_buddy.method import LayerPath, Route
from vllm_buddy.serving.admission.auto_limits import AutoBudget
from vllm_buddy.serving.admission.chooser import Terms
from vllm_buddy.serving.compat import BlockHasher
from vllm_buddy.serving.schedule.draft_pace import RequestDrafts
from vllm_buddy.serving.schedule.outcome import Outcome
from vllm_buddy.serving.schedule.plan import LayerPlaces
from vllm_buddy.serving.schedule.request_units import RequestUnits


@dataclass
class RoutedRequest:
    """One request, from its arrival to its end.

    asked: what it lets "auto" choose; None for a budget that is a number.
    excess: of its prompt, see BudgetChooser; None as `asked`.
    terms: under which "auto" was decided for it last; None as `asked`. Once it runs, only harder ones decide again.
    planned: number of tokens that were planned so far, without drafts that may be rejected. A request that is computed
        again stands before it.
    drafts: made for it by DepthDrafts; None on a server without that drafter.
    told: number of tokens whose paths streamed chunks have told so far; None if the request does not ask for paths.
    hasher: of its blocks, once their hashes end before a change of path; None before, or without a prefix cache.
    units: that it takes of the KV cache; None in the dense layout. sent_layers: the layers whose units workers know.
    """

    route: Route
    outcome: Outcome
    asked: AutoBudget | None = None
    excess: np.ndarray | None = None
    terms: Terms | None = None
    planned: int = 0
    drafts: RequestDrafts | None = None
    told: int | None = None
    hasher: BlockHasher | None = None
    units: RequestUnits | None = None
    sent_layers: LayerPath = 0

    def new_places(self, *, starts: bool) -> LayerPlaces | None:
        """What the workers do not know yet of where its layers lie. starts: whether they know nothing of it."""
        if self.units is None or (not starts and self.units.held == self.sent_layers):
            return None
        self.sent_layers = self.units.held
        return self.units.layer_places()
