"""The drafter's side of scheduling: on which layers drafts are made, and how many are worth their cost.

A request in lossless mode runs all layers, and so do its drafts when they are checked, so its answer is that of the
full model. Drafts come from n-grams of the request, or from the model itself, on a short path of its layers
(self-speculation; the single-device form of DEX, arXiv 2606.29223).

Whether a draft is right is estimated for each request from its own drafts, and for a new one from those of all
requests. Then drafts pay as follows (`method/drafting.py`):

- N-grams cost rows in the step that checks them. Each request has the number that gains most by itself, 0 where none
  gains more than MARGIN. A request without any tries some now and then, because its text may change: as many as cost
  least.
- A draft pass reads its layers once for all requests that draft, so they draft together or not at all: as many as gain
  most for the whole batch. A server that makes none tries one pass now and then.

What rows and passes cost is measured too (`step_costs.py`). Drafts change no greedy token, and requests with a
seed get none (`scheduler.py`), so nothing but speed follows from these estimates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_buddy.artifact import Artifact
from vllm_buddy.errors import SettingsError
from vllm_buddy.method import ExitAdapter, LayerPath
from vllm_buddy.method.budget import MIN_DEPTH
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.drafting import chain_gains, pass_cost
from vllm_buddy.serving.schedule.plan import Executed, StepPlan
from vllm_buddy.serving.schedule.step_costs import EXPECTED_ROW, StepCosts
from vllm_buddy.serving.start.setting_sections import DraftSettings
from vllm_buddy.serving.start.settings import BuddySettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# What `--speculative-config` names as its model, with method custom_class.
DEPTH_DRAFTS = "vllm_buddy.serving.worker.depth_drafts.DepthDrafts"

MARGIN = 0.03  # least gain for which drafts are made
_SHARE = 0.3  # of the layers, for a draft: where SmolLM2's depth profile predicts the most
PROBE_EVERY = 48  # steps without drafts until one is tried, which costs about 1%
_PRIOR_WEIGHT = 4.0  # drafts that the expectation before the first counts as
_MEMORY, _SERVER_MEMORY = 0.9, 0.98  # weight of what was known, per step with drafts: of one request, and of all


def drafts_by_depth(vllm_config: "VllmConfig") -> bool:
    """Whether a server's drafter is DepthDrafts."""
    spec = vllm_config.speculative_config
    return spec is not None and spec.method == "custom_class" and spec.model == DEPTH_DRAFTS


@dataclass(frozen=True)
class DraftPass:
    """A pass of the model that drafts, or that checks drafts before the full model does.

    path: the layers that it runs. cost: a share of a full step of few tokens, that of the weights that it reads.
    adapter: of the path's exit; None: it has none. bypass: of the path's gaps; None: that of the artifact.
    """

    path: LayerPath
    cost: float
    adapter: ExitAdapter | None = field(default=None, compare=False)
    bypass: Bypass | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls, artifact: Artifact, hf_config: Any, name: str, depth: int, vocabulary: np.ndarray | None
    ) -> "DraftPass":
        """The pass of the artifact's exit of a depth, else of the library's path.

        name: of the setting that asks for the depth. hf_config, vocabulary: see DraftPasses.

        Raises:
            SettingsError: there is no path of this depth.
        """
        num_layers, bypass_rank = artifact.config.base_model.num_layers, artifact.config.bypass_rank
        if not MIN_DEPTH <= depth < num_layers:
            raise SettingsError(f"{name} is {depth}; allowed are {MIN_DEPTH} to {num_layers - 1} layers")
        num_tokens = None if vocabulary is None else len(vocabulary)
        for draft in artifact.drafts:
            if draft.path.bit_count() == depth:
                cost = pass_cost(hf_config, depth, draft.ranks(bypass_rank), num_tokens)
                return cls(draft.path, cost, draft.adapter, draft.bypass)
        path = artifact.first_path(depth)
        if path is None:
            known = ", ".join(map(str, sorted(artifact.config.library or ())))
            raise SettingsError(
                f"{name} is {depth}, of which the path library has no path; it has paths of {known} layers"
            )
        return cls(path, pass_cost(hf_config, depth, (num_layers - depth) * bypass_rank, num_tokens))

    def to(self, like: Any) -> "DraftPass":
        """The same with weights in the dtype and on the device of a tensor."""
        return replace(
            self, adapter=self.adapter and self.adapter.to(like), bypass=self.bypass and self.bypass.to(like)
        )

    def __str__(self) -> str:
        adapted = "without an" if self.adapter is None else "with an"
        own = "" if self.bypass is None else " and a bypass of each gap"
        return f"{self.path.bit_count()} layers {adapted} adapter{own}"


@dataclass(frozen=True)
class DraftPasses:
    """Where drafts come from.

    drafting: the pass that drafts a token. refining: a deeper one that checks the drafts of one step, and corrects the
        first that it finds wrong, before the full model does; None: there is no such pass.
    vocabulary: [n], int64, the tokens that drafts choose among; None: all.
    """

    drafting: DraftPass
    refining: DraftPass | None = None
    vocabulary: np.ndarray | None = field(default=None, compare=False)

    @classmethod
    def of(cls, settings: BuddySettings, artifact: Artifact, hf_config: Any) -> "DraftPasses":
        """What the settings ask for: at the depth of one of the artifact's exits that exit, else the library's path.

        Where they ask for no depth, the artifact's first exit drafts. hf_config: of the model.

        Raises:
            SettingsError: a depth that the artifact has no path of.
        """
        num_layers, drafts = artifact.config.base_model.num_layers, settings.drafts
        own = artifact.drafts[0].path.bit_count() if artifact.drafts else max(MIN_DEPTH, round(_SHARE * num_layers))
        depth = drafts.depth or own
        vocabulary = artifact.draft_vocabulary if drafts.vocabulary == "frequent" else None
        drafting = DraftPass.of(artifact, hf_config, "drafts.depth", depth, vocabulary)
        if drafts.refine_depth is None:
            return cls(drafting, vocabulary=vocabulary)
        if drafts.refine_depth <= depth:
            raise SettingsError(
                f"drafts.refine_depth {drafts.refine_depth} is not more than the {depth} layers that drafts run"
            )
        refining = DraftPass.of(artifact, hf_config, "drafts.refine_depth", drafts.refine_depth, vocabulary)
        return cls(drafting, refining, vocabulary)

    def cost(self, num_drafts: int) -> float:
        """What it costs to draft so many tokens for a request, at least one."""
        return num_drafts * self.drafting.cost + (0.0 if self.refining is None else self.refining.cost)

    def to(self, like: Any) -> "DraftPasses":
        """The same with weights in the dtype and on the device of a tensor."""
        return replace(self, drafting=self.drafting.to(like), refining=self.refining and self.refining.to(like))

    def summary(self, artifact: Artifact) -> str:
        """What drafts run, for the log of the start."""
        told = f"drafts run {self.drafting}"
        if self.refining is not None:
            told += f", and {self.refining} check them"
        if self.vocabulary is not None:
            told += f", and choose among {len(self.vocabulary)} tokens"
        if not artifact.drafts:
            return f"{told}: the artifact has no trained draft exits (`vllm-buddy train-drafts` adds them)"
        trained = ", ".join(str(draft.path.bit_count()) for draft in artifact.drafts)
        return f"{told}; the artifact's draft exits have {trained} layers"


@dataclass
class Acceptance:
    """An estimate of the probability that a draft is right if those before it are. memory: weight of what was known."""

    right: float
    tried: float
    memory: float

    @classmethod
    def expected(cls, value: float, memory: float) -> "Acceptance":
        """The estimate before there is experience."""
        return cls(value * _PRIOR_WEIGHT, _PRIOR_WEIGHT, memory)

    @property
    def value(self) -> float:
        """In [0, 1]."""
        return self.right / self.tried

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Learn from one step's drafts. Those after the first wrong one tell nothing."""
        self.right = self.memory * self.right + num_accepted
        self.tried = self.memory * self.tried + min(num_drafted, num_accepted + 1)


@dataclass
class RequestDrafts:
    """The drafts of one request. ngrams, by_depth: of both kinds, None where it gets none of a kind.

    last_by_depth: whether the drafts for the next step were made on layers.
    num_allowed: of these drafts, those that come before the first which a grammar forbids; None: it forbids none.
    """

    ngrams: Acceptance | None
    by_depth: Acceptance | None
    last_by_depth: bool = False
    steps_without_ngrams: int = 0
    num_allowed: int | None = None


class Drafting:
    """How a server with the drafter DepthDrafts drafts. num_drafts: of a step, at most."""

    def __init__(self, passes: DraftPasses, settings: DraftSettings, num_drafts: int) -> None:
        self.passes, self.settings = passes, settings
        row = settings.row_cost
        self.costs = StepCosts(EXPECTED_ROW if row is None else row, measured=row is None)
        self._num_drafts = num_drafts
        # Of all requests.
        self._ngrams = Acceptance.expected(settings.acceptance, _SERVER_MEMORY)
        self._by_depth = Acceptance.expected(settings.acceptance, _SERVER_MEMORY)
        self._steps_without_passes = 0

    def of_request(self, *, lossless: bool) -> RequestDrafts:
        """The drafts of an arriving request."""
        ngrams = Acceptance.expected(self._ngrams.value, _MEMORY) if self.settings.ngram_max else None
        return RequestDrafts(ngrams, Acceptance.expected(self._by_depth.value, _MEMORY) if lossless else None)

    def wanted(self, asking: Sequence[tuple[RequestDrafts, int]], num_requests: int) -> list[tuple[int, int]]:
        """Drafts to make after a step of num_requests requests: for each that asks, of n-grams and on layers.

        asking: those that will have sampled a token, with the drafts that each has room for. To be called once a step.
        """
        passes = self._num_passes([drafts.by_depth for drafts, _ in asking if drafts.by_depth], num_requests)
        rows = self._ngram_rows(num_requests)
        return [
            (min(self._num_ngrams(drafts, rows), room), min(passes, room) if drafts.by_depth else 0)
            for drafts, room in asking
        ]

    def observe(self, drafts: RequestDrafts, counts: Executed, num_accepted: int) -> bool:
        """Learn from the drafts that a step checked. Returns whether it checked drafts that were made on layers."""
        by_depth, num_allowed, num_drafts = drafts.last_by_depth, drafts.num_allowed, len(counts.drafts)
        drafts.last_by_depth, drafts.num_allowed = counts.drafting > 0, None
        if num_drafts == num_accepted == num_allowed:
            num_drafts += 1  # the next one was wrong: the answer cannot have it
        if not num_drafts:
            return False
        if not by_depth:
            drafts.steps_without_ngrams = 0
        for known in (drafts.by_depth, self._by_depth) if by_depth else (drafts.ngrams, self._ngrams):
            if known is not None:
                known.observe(num_drafts, num_accepted)
        return by_depth

    def observe_step(self, plan: StepPlan, executed: Mapping[str, Executed], seconds: float) -> None:
        """Learn from the time of a step and of the draft passes after it."""
        if not plan or any(request.num_prompt for request in plan.values()):
            return
        drafting = [plan[req_id].wanted_drafts for req_id, counts in executed.items() if counts.drafting]
        num_rows = sum(run.num_tokens for request in plan.values() for run in request.runs)
        self.costs.observe(num_rows, self._pass_costs(max(drafting, default=0), len(drafting)), seconds)

    def _pass_costs(self, num_passes: int, num_drafting: int) -> float:
        """What passes of num_drafting requests each are expected to cost, as a share of a step of one row."""
        if num_passes == 0:
            return 0.0
        per_pass = 1.0 + self.costs.expected_row * (num_drafting - 1)
        return self.passes.cost(num_passes) * per_pass

    def _num_ngrams(self, drafts: RequestDrafts, rows: Sequence[float]) -> int:
        """rows: see _ngram_rows."""
        if drafts.ngrams is None:
            return 0
        best = _best(chain_gains(drafts.ngrams.value, rows))
        if best == 0 and drafts.steps_without_ngrams >= PROBE_EVERY:  # until a step checks one: to look costs nothing
            return min(range(1, self._num_drafts + 1), key=lambda n: (n * rows[n - 1], -n))
        if best == 0:
            drafts.steps_without_ngrams += 1
        return best

    def _ngram_rows(self, num_requests: int) -> list[float]:
        """[num_drafts], what each of 1, 2, ... rows more costs, as a share of what one request pays of a step."""
        costs, numbers = self.costs, range(1, self._num_drafts + 1)
        if num_requests == 1:
            return [(costs.step(1 + n) / costs.step(1) - 1.0) / n for n in numbers]
        # How many rows the others will have is not known.
        row = costs.row(num_requests, num_requests * (1 + self._num_drafts))
        return [num_requests * row for _ in numbers]

    def _num_passes(self, drafting: Sequence[Acceptance], num_requests: int) -> int:
        """Draft passes after a step in which all of `drafting` take part, of num_requests requests."""
        if not drafting:
            return 0
        costs = self.costs
        most = self._num_drafts - (self.passes.refining is not None)  # a refining pass adds a token
        most = min(most, self.settings.most or most)
        right = [acceptance.value for acceptance in drafting]
        all_right, tokens, gains = [1.0] * len(right), 1.0, []
        for n in range(1, most + 1):
            all_right = [before * own for before, own in zip(all_right, right)]
            tokens += sum(all_right) / num_requests
            cost = costs.step(num_requests + n * len(drafting)) + costs.passes * self._pass_costs(n, len(drafting))
            gains.append(tokens / (cost / costs.step(num_requests)))
        best = _best(gains)
        if best == 0 and self._steps_without_passes >= PROBE_EVERY:
            best = 1
        self._steps_without_passes = 0 if best else self._steps_without_passes + 1
        return best


def _best(gains: Sequence[float]) -> int:
    """The number of drafts of the largest gain, gains[n - 1] that of n; 0 if none is worth it."""
    most = max(gains, default=0.0)
    return gains.index(most) + 1 if most > 1.0 + MARGIN else 0
