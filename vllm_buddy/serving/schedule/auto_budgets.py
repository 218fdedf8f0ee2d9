"""Budget "auto" in the scheduler: its terms follow the load, and requests are decided again where that moved them.

A burst arrives under the terms of the calm before it. With service objectives, requests are therefore decided anew when
they may leave the queue, where they have run nothing yet. Those that run are lowered where they got harder.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from vllm.v1.request import Request, RequestStatus

from vllm_buddy.artifact import Artifact
from vllm_buddy.serving.admission.auto_limits import AutoLimits
from vllm_buddy.serving.admission.chooser import BudgetChooser
from vllm_buddy.serving.admission.latency import LatencyMeter
from vllm_buddy.serving.schedule.outcome import Outcome
from vllm_buddy.serving.schedule.routed_request import RoutedRequest
from vllm_buddy.serving.start.settings import BuddySettings


class AutoBudgets:
    """What a scheduler knows of the load, and what follows from it for requests of budget "auto".

    chooser: None where no request may ask for "auto". meter: of latencies; None without service objectives.
    lowers_running: whether running requests are lowered.

    What depth does not shorten is no load. blocked: ids of requests that wait for something else than the server's
    room, such as their grammar. paused: whether an operator holds up the queue.
    """

    def __init__(self, settings: BuddySettings, artifact: Artifact, auto: AutoLimits | None) -> None:
        self.chooser = BudgetChooser.from_settings(settings, artifact, auto)
        self.meter = None if settings.slo is None else LatencyMeter()
        self.lowers_running = settings.slo is not None or (settings.load is not None and settings.load.lowers_running)
        self.blocked: set[str] = set()
        self.paused = False

    def arrives(self, request: Request) -> None:
        """Begin to follow a request, whatever its budget."""
        if _is_blocked(request):
            self.blocked.add(request.request_id)
        elif self.meter is not None and not request.resumable:  # a session waits for its client, too
            self.meter.arrives(request.request_id)

    def starts(self, request_ids: Iterable[str], requests: Mapping[str, Request]) -> None:
        """Note what a step takes from the queue. requests: all of the scheduler; what has its grammar now waits."""
        self.unblock(requests)
        if self.meter is not None:
            self.meter.starts(request_ids)

    def unblock(self, requests: Mapping[str, Request]) -> None:
        """Let requests whose grammar has come count as waiting for the server, from now on."""
        for request in [requests[one] for one in self.blocked if not _is_blocked(requests[one])]:
            self.blocked.remove(request.request_id)
            self.arrives(request)

    def pauses(self, paused: bool) -> None:
        """Note that an operator holds up the queue, or lets it go on."""
        if self.meter is not None and self.paused and not paused:
            self.meter.goes_on()
        self.paused = paused

    def gets_token(self, request_ids: Iterable[str], tokens: Iterable[Sequence[int]]) -> None:
        """Note which requests a step gave tokens. tokens: of each of them, none or more."""
        if self.meter is not None:
            self.meter.gets_token(one for one, its in zip(request_ids, tokens) if len(its))

    def ends(self, request_id: str) -> None:
        """Forget a request."""
        self.blocked.discard(request_id)
        if self.meter is not None:
            self.meter.ends(request_id)

    def observe(self, num_waiting: int, num_running: int, kv_use: float, *, idle: bool) -> None:
        """Let the terms follow the load. There must be a chooser.

        num_waiting: requests in the queue, blocked ones included. idle: the server has run out of work.
        """
        assert self.chooser is not None
        if self.meter is not None:
            measured = self.meter.take()
            if self.paused:
                measured.wait_s = 0.0
            self.chooser.observe_latencies(measured, idle=idle)
        else:
            self.chooser.observe(0 if self.paused else num_waiting - len(self.blocked), num_running, kv_use)

    def choose_again(self, waiting: Iterable[tuple[Request, RoutedRequest]]) -> Iterator[tuple[Request, RoutedRequest]]:
        """Decide for requests that may leave the queue; yields those that need another route."""
        chooser = self.chooser
        assert chooser is not None
        for request, routed in waiting:
            if routed.asked is None or routed.excess is None or routed.planned or request.num_computed_tokens:
                continue
            if chooser.terms_of(routed.asked) != routed.terms:
                choice = chooser.choose(routed.asked, routed.excess)
                routed.terms = choice.terms
                routed.outcome = Outcome(choice.budget, choice.depth, choice.terms.price)
                if choice.depth != routed.route.depth:
                    yield request, routed

    def lower(self, running: Iterable[tuple[Request, RoutedRequest]]) -> None:
        """Where the terms are harder than when it was decided, lower decoding requests to the new choice."""
        chooser = self.chooser
        assert chooser is not None
        for request, routed in running:
            position = request.num_computed_tokens
            asked, route = routed.asked, routed.route
            if asked is None or routed.excess is None or routed.terms is None:
                continue
            if not chooser.terms_of(asked).harder_than(routed.terms):
                continue
            # Tokens that ran, or will run, at its depth. Accepted drafts are in the last bound, not in `planned`.
            if position < max(request.num_prompt_tokens, routed.planned, request.num_tokens - 1):
                continue
            choice = chooser.choose(asked, routed.excess)
            routed.terms = choice.terms
            route.decide(position, request.all_token_ids)  # what ran so far, accepted drafts included
            if choice.depth < route.depth:
                lowered = route.lower(choice.depth, position, request.all_token_ids)
                if lowered and routed.units is not None:
                    routed.units.lowered(position)


def _is_blocked(request: Request) -> bool:
    if request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
        # vLLM leaves this status when it could start the request, not when its grammar has come.
        asked = request.structured_output_request
        return asked is None or asked.grammar is None
    return request.status.name.startswith("WAITING_FOR_")
