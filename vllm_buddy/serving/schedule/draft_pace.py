"""The drafter's side of scheduling: on which layers drafts are made, and how many are worth their cost for a request.

A request in lossless mode runs all layers, and so do its drafts when they are checked, so its answer is that of the
full model. Drafts come from n-grams of the request, or from the model itself, on a short path of its layers
(self-speculation; the single-device form of DEX, arXiv 2606.29223). Against a step without drafts, n drafts give

    gain(n) = (1 + a + ... + a^n) / (1 + n (draft + row / share) + refine)

with a the probability that a draft is right if those before it are; draft and refine the costs of the passes that make
them, as shares of a step of the whole model, and nothing for n-grams; row the cost of one more row in a step; share
what one request of the batch pays of a step. The number of drafts is the n of most gain, and 0 where no n gains more
than MARGIN. a is estimated from the request's own drafts. A request without drafts tries one now and then, because its
text may change. Drafts change no token of an answer, so nothing but speed follows from these estimates.
"""

from dataclasses import dataclass
from typing import Any

from vllm_buddy.artifact import Artifact
from vllm_buddy.errors import SettingsError
from vllm_buddy.method import LayerPath
from vllm_buddy.method.budget import MIN_DEPTH
from vllm_buddy.method.drafting import batch_share, draft_gain, pass_cost
from vllm_buddy.serving.schedule.plan import Executed
from vllm_buddy.serving.start.settings import BuddySettings, DraftSettings

# What `--speculative-config` names as its model, with method custom_class.
DEPTH_DRAFTS = "vllm_buddy.serving.worker.depth_drafts.DepthDrafts"

MARGIN = 0.03  # least gain for which drafts are made
_SHARE = 0.3  # of the layers, for a draft: where SmolLM2's depth profile predicts the most
PROBE_EVERY = 48  # steps without drafts until one is tried
_PRIOR_WEIGHT = 4.0  # drafts that the expectation before the first counts as
_MEMORY = 0.9  # weight of what was known, per observed step


@dataclass(frozen=True)
class DraftPath:
    """Where drafts come from.

    path: of a draft pass. refined: a deeper path that checks the drafts of one pass, and corrects the first that it
        finds wrong, before the full model does; None: there is no such pass.
    cost, refine_cost: of one pass of each, as a share of a full step of few tokens: of the weights that it reads.
    """

    path: LayerPath
    cost: float
    refined: LayerPath | None = None
    refine_cost: float = 0.0

    @classmethod
    def of(cls, settings: BuddySettings, artifact: Artifact, hf_config: Any) -> "DraftPath":
        """What the settings ask for. hf_config: of the model.

        Raises:
            SettingsError: a depth that the artifact has no path of.
        """
        num_layers, drafts = artifact.config.base_model.num_layers, settings.drafts
        depth = drafts.depth or max(MIN_DEPTH, round(_SHARE * num_layers))
        path = _path(artifact, "drafts.depth", depth)
        cost = pass_cost(hf_config, depth, artifact.config.bypass_rank)
        if drafts.refine_depth is None:
            return cls(path, cost)
        if drafts.refine_depth <= depth:
            raise SettingsError(
                f"drafts.refine_depth {drafts.refine_depth} is not more than the {depth} layers that drafts run"
            )
        refined = _path(artifact, "drafts.refine_depth", drafts.refine_depth)
        return cls(path, cost, refined, pass_cost(hf_config, drafts.refine_depth, artifact.config.bypass_rank))


class DraftPace:
    """How many drafts of one kind one request gets in its next step.

    most: drafts per step. expected: the probability that a draft is right, before there is experience. cost,
    refine_cost: see DraftPath; 0 for n-grams. row_cost: of one more row in a step, as a share of a step of one row.
    """

    def __init__(
        self, most: int, expected: float, row_cost: float, *, cost: float = 0.0, refine_cost: float = 0.0
    ) -> None:
        self._most, self._row_cost, self._cost, self._refine_cost = most, row_cost, cost, refine_cost
        self._right = expected * _PRIOR_WEIGHT
        self._tried = _PRIOR_WEIGHT
        self._since_drafts = 0

    @property
    def acceptance(self) -> float:
        """The estimate of a."""
        return self._right / self._tried

    def num_drafts(self, num_requests: int) -> int:
        """Drafts for the step after the next, which has about num_requests requests. To be called once a step."""
        row = self._row_cost / batch_share(num_requests, self._row_cost)
        best, most_gain = 0, 1.0 + MARGIN
        for n in range(1, self._most + 1):
            right = [self.acceptance**i for i in range(1, n + 1)]
            gain = draft_gain(right, self._cost, row, self._refine_cost)
            if gain > most_gain:
                best, most_gain = n, gain
        if best == 0 and self._since_drafts >= PROBE_EVERY:
            best = 1
        self._since_drafts = 0 if best else self._since_drafts + 1
        return best

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Learn from one step's drafts. Those after the first wrong one tell nothing."""
        self._right = _MEMORY * self._right + num_accepted
        self._tried = _MEMORY * self._tried + min(num_drafted, num_accepted + 1)


@dataclass(frozen=True)
class Drafting:
    """How a server with the drafter DepthDrafts drafts. num_drafts: of a step, at most."""

    path: DraftPath
    settings: DraftSettings
    num_drafts: int

    @property
    def most_passes(self) -> int:
        """Draft passes after one step, at most."""
        most = self.num_drafts - (self.path.refined is not None)  # a refining pass adds a token
        return min(most, self.settings.most or most)

    def of_request(self, *, lossless: bool) -> "RequestDrafts":
        """The drafts of an arriving request."""
        expected, row_cost, path = self.settings.acceptance, self.settings.row_cost, self.path
        ngrams = DraftPace(self.num_drafts, expected, row_cost) if self.settings.ngram_max else None
        by_depth = DraftPace(self.most_passes, expected, row_cost, cost=path.cost, refine_cost=path.refine_cost)
        return RequestDrafts(ngrams, by_depth if lossless else None)


@dataclass
class RequestDrafts:
    """The drafts of one request. ngrams, by_depth: paces of both kinds, None where it gets none of a kind.

    last_by_depth: whether the drafts for the next step were made on layers.
    """

    ngrams: DraftPace | None
    by_depth: DraftPace | None
    last_by_depth: bool = False

    def wanted(self, num_requests: int, left: int) -> tuple[int, int]:
        """Drafts to make after a step of num_requests requests, of n-grams and on layers, up to `left`."""
        ngrams, by_depth = (
            0 if pace is None else min(pace.num_drafts(num_requests), left) for pace in (self.ngrams, self.by_depth)
        )
        return ngrams, by_depth

    def observe(self, counts: Executed, num_accepted: int) -> bool:
        """Learn from the drafts that a step checked. Returns whether it checked drafts that were made on layers."""
        checked_by_depth = self.last_by_depth and bool(counts.drafts)
        pace = self.by_depth if self.last_by_depth else self.ngrams
        if counts.drafts and pace is not None:
            pace.observe(len(counts.drafts), num_accepted)
        self.last_by_depth = counts.drafting > 0
        return checked_by_depth


def _path(artifact: Artifact, name: str, depth: int) -> LayerPath:
    num_layers = artifact.config.base_model.num_layers
    if not MIN_DEPTH <= depth < num_layers:
        raise SettingsError(f"{name} is {depth}; allowed are {MIN_DEPTH} to {num_layers - 1} layers")
    path = artifact.first_path(depth)
    if path is None:
        known = ", ".join(map(str, sorted(artifact.config.library or ())))
        raise SettingsError(f"{name} is {depth}, of which the path library has no path; it has paths of {known} layers")
    return path
