"""What becomes of drafts: asked for in a step's plan, run by the next step, then part of the answer or not.

vLLM's scheduler comes by in this order: `ask`, with the plan of a step; with its output `learn`, and `ran` for each of
its requests; `kept`, where vLLM takes in the tokens of a request; and `drop_rest`, for requests whose tokens it did not
take. Before the next plan, a grammar may have forbidden drafts (`allowed`).
"""

from collections.abc import Mapping

from vllm_buddy.serving.schedule.draft_pace import Drafting, RequestDrafts
from vllm_buddy.serving.schedule.metrics import EngineMetrics
from vllm_buddy.serving.schedule.plan import Executed, StepPlan
from vllm_buddy.serving.schedule.routed_request import RoutedRequest


class DraftLedger:
    """The drafts of all requests of an engine, whatever makes them.

    drafting: how a server with the drafter DepthDrafts drafts. None: vLLM's own speculator drafts, or nothing does;
        then drafts are counted, and none are asked for.
    """

    def __init__(self, drafting: Drafting | None, metrics: EngineMetrics) -> None:
        self.drafting = drafting
        self._metrics = metrics
        self._ran: dict[str, Executed] = {}  # of requests with drafts in the step that is being taken in

    def of_request(self, *, lossless: bool) -> RequestDrafts | None:
        """What is known of the drafts of an arriving request; None: nothing is asked for."""
        return None if self.drafting is None else self.drafting.of_request(lossless=lossless)

    def ask(self, plan: StepPlan, room: Mapping[str, tuple[RequestDrafts, int]]) -> None:
        """Add to a step's plan the drafts to make after it.

        room: of requests that will have sampled a token, how many drafts each has room for.
        """
        assert self.drafting is not None
        for req_id, wanted in zip(room, self.drafting.wanted(list(room.values()), len(plan))):
            plan[req_id] = plan[req_id]._replace(wanted_ngrams=wanted[0], wanted_drafts=wanted[1])

    def learn(self, plan: StepPlan, executed: Mapping[str, Executed], seconds: float) -> None:
        """Learn what rows and draft passes cost. seconds: from a step's plan to its output."""
        if self.drafting is not None:
            self.drafting.observe_step(plan, executed, seconds)

    def ran(self, req_id: str, routed: RoutedRequest, counts: Executed, num_right: int) -> None:
        """Count what a step executed for a request; where it had drafts, once it is known which of them are kept.

        num_right: of its drafts, those that the step confirmed.
        """
        if counts.drafts:
            self._ran[req_id] = counts
        else:
            routed.outcome.add(counts)
        if self.drafting is not None and routed.drafts is not None:
            by_depth = self.drafting.observe(routed.drafts, counts, num_right)
            self._metrics.observe_drafts(counts, num_right if by_depth else None)

    def kept(self, req_id: str, routed: RoutedRequest | None, num_kept: int) -> None:
        """Count the drafts of a request, if the step had any. num_kept: those that are part of the answer now."""
        counts = self._ran.pop(req_id, None)
        if counts is not None and routed is not None:
            routed.outcome.add(counts, num_kept)

    def drop_rest(self, requests: Mapping[str, RoutedRequest]) -> None:
        """Count as rejected the drafts of requests whose tokens of the step were not taken."""
        for req_id in [*self._ran]:
            self.kept(req_id, requests.get(req_id), 0)

    @staticmethod
    def allowed(routed: RoutedRequest, num_made: int, num_allowed: int) -> None:
        """Note how many of the drafts that were made for a request its grammar allows."""
        if routed.drafts is not None:
            routed.drafts.num_allowed = num_allowed if num_allowed < num_made else None
