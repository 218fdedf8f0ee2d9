"""vLLM's scheduler with routing: asks each request's route which layers its tokens of the next step execute.

The router reads token ids only, so all decisions are made here, on the host, before the step. The plan goes to the
workers with vLLM's SchedulerOutput, and the layers executed come back with its ModelRunnerOutput.
"""

import time
from itertools import islice
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_buddy.artifact import load_artifact
from vllm_buddy.method import Route
from vllm_buddy.serving.admission.limits import FixedBudget
from vllm_buddy.serving.admission.option_names import OUTCOME_KEY
from vllm_buddy.serving.admission.options import context_tokens, wants_paths
from vllm_buddy.serving.compat import add_figures, finished_params, first_prefill
from vllm_buddy.serving.schedule.auto_budgets import AutoBudgets
from vllm_buddy.serving.schedule.draft_ledger import DraftLedger
from vllm_buddy.serving.schedule.draft_pace import Drafting, DraftPasses, RequestDrafts
from vllm_buddy.serving.schedule.metrics import EngineMetrics, Stopwatch
from vllm_buddy.serving.schedule.outcome import Outcome, described
from vllm_buddy.serving.schedule.plan import (
    EXECUTED_ATTRIBUTE,
    PLAN_ATTRIBUTE,
    Executed,
    RequestPlan,
    StepPlan,
    runs_with_drafts,
)
from vllm_buddy.serving.schedule.prefix_cache import end_hash_chain, limit_publishing, salt
from vllm_buddy.serving.schedule.request_units import RequestUnits
from vllm_buddy.serving.schedule.route_maker import RouteMaker
from vllm_buddy.serving.schedule.routed_request import RoutedRequest
from vllm_buddy.serving.schedule.unit_blocks import use_units
from vllm_buddy.serving.start.attached import kv_units_of, limits_of
from vllm_buddy.serving.start.settings import BuddySettings, engine_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler as _Base
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import DraftTokenIds
else:
    _Base = object

_MOST_STARTING = 16  # requests that are looked at, of those that may leave the queue in a step


class _Routing(_Base):
    """Mixin over vLLM's (Async)Scheduler: a route per request, a plan per step."""

    def __init__(self, vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        settings = engine_settings(vllm_config)
        artifact = load_artifact(settings.artifact_folder)
        self._limits = limits_of(vllm_config.model_config)
        self._salt_prefix = f"{artifact.digest}:{settings.kv}"
        self._routes = RouteMaker.of(settings, artifact, _decision_lag(settings, vllm_config))
        self._routed: dict[str, RoutedRequest] = {}  # by request id
        self._routing_time = Stopwatch()  # of the current step
        self._metrics = EngineMetrics(collects=self.log_stats)
        self._auto = AutoBudgets(settings, artifact, self._limits.auto)
        self._step_started = 0.0
        drafting = None
        if self._limits.lossless:
            passes = DraftPasses.of(settings, artifact, vllm_config.model_config.hf_text_config)
            drafting = Drafting(passes, settings.drafts, self.num_spec_tokens)
            # vLLM reserves no slots for what a drafter of method custom_class writes.
            self.num_lookahead_tokens = self.num_spec_tokens
        self._drafts = DraftLedger(drafting, self._metrics)
        self._units = kv_units_of(vllm_config.model_config)
        if self._units is not None:
            use_units(self.kv_cache_manager, self._units_of)
        limit_publishing(self.kv_cache_manager.coordinator, self._publishable_tokens)

    def add_request(self, request: Request) -> None:
        """Decide the paths of the prompt, and salt the request's prefix-cache keys with its path."""
        if request.request_id not in self.requests:
            started = time.perf_counter()
            routed = self._routed[request.request_id] = self._route(request)
            if request.sampling_params is not None and wants_paths(request.sampling_params.extra_args):
                routed.told = 0
            if not _draws_by_seed(request):
                routed.drafts = self._drafts.of_request(lossless=routed.outcome.lossless)
            self._prepare_cache(request, routed)
            self._auto.arrives(request)
            self._metrics.observe_routing(time.perf_counter() - started)
        super().add_request(request)

    def _prepare_cache(self, request: Request, routed: RoutedRequest) -> None:
        """Make what a request's place in the KV cache needs of its route, before it has any."""
        if self._units is not None:
            routed.units = RequestUnits(self._units, routed.route, self.block_size)
        key = routed.route.cache_key
        salt(request, None if key is None else f"{self._salt_prefix}:{key}", routed.hasher)
        routed.hasher = None
        if key is not None and self.kv_cache_manager.enable_caching:
            # If the path changes within the prompt, the request must not look up blocks after the change.
            self._publishable_tokens(request, request.num_tokens)

    def _route(self, request: Request) -> RoutedRequest:
        """Decide budget, depth and first path of an arriving request."""
        assert request.sampling_params is not None  # generation models only, checked at start
        if request.resumable:
            # A streaming-input session rewrites its prompt while it runs, so there is no prompt to route by. One that
            # asks for a budget was refused.
            return RoutedRequest(self._new_route(request, 1.0), Outcome(1.0, self._limits.num_layers))
        extra_args = request.sampling_params.extra_args
        asked = self._limits.resolve(extra_args)
        num_context = context_tokens(extra_args)
        if isinstance(asked, FixedBudget):
            route = self._new_route(request, asked.budget)
            return RoutedRequest(route, Outcome(asked.budget, asked.depth, lossless=asked.lossless))
        chooser = self._auto.chooser
        assert chooser is not None  # "auto" was refused otherwise
        self._observe_load(idle=False)
        excess = chooser.take_in(request.all_token_ids[:num_context])
        choice = chooser.choose(asked, excess)
        route = self._new_route(request, choice.budget)
        outcome = Outcome(choice.budget, choice.depth, choice.terms.price)
        return RoutedRequest(route, outcome, asked, excess, choice.terms)

    def _new_route(self, request: Request, budget: float) -> Route:
        extra_args = request.sampling_params.extra_args if request.sampling_params is not None else None
        return self._routes.route(
            budget,
            request.all_token_ids,
            request.num_prompt_tokens,
            context_tokens(extra_args),
            full_prompt=self._limits.full_prompt(extra_args),
        )

    def _publishable_tokens(self, request: Request, num_tokens: int) -> int:
        """How many of a request's first num_tokens tokens have run one path only (see prefix_cache)."""
        routed = self._routed[request.request_id]
        route = routed.route
        if route.limits_sharing:
            with self._routing_time:
                route.decide(num_tokens, request.all_token_ids)
        uniform = route.uniform_length
        if uniform is None:
            return num_tokens
        # Also where the change lies ahead: under asynchronous scheduling a path is decided before its token arrives.
        routed.hasher = end_hash_chain(request, uniform // self.hash_block_size) or routed.hasher
        return min(uniform, num_tokens)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """vLLM's. Paths that accepted drafts ran are decided before, so that no block after a change is looked up."""
        self._publishable_tokens(request, request.num_tokens - 1)
        super()._preempt_request(request, *args, **kwargs)

    def _units_of(self, req_id: str, num_tokens: int) -> RequestUnits:
        """The KV units of a request, for its first num_tokens tokens."""
        units = self._routed[req_id].units
        assert units is not None
        units.advance(num_tokens, self.requests[req_id].all_token_ids)
        return units

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Add the outcome to the kv_transfer_params of the final response."""
        freed = super()._free_request(request, *args, **kwargs)
        routed = self._routed.pop(request.request_id)
        self._auto.ends(request.request_id)
        # Accepted drafts ran on decisions that were made on a copy. A request that was preempted while its last token
        # was on the way counts no computed tokens any more.
        num_run = min(max(request.num_computed_tokens, routed.planned), request.num_tokens - 1)
        routed.route.decide(num_run, request.all_token_ids)
        self._metrics.observe_request(routed.outcome, routed.route, self._limits.num_layers)
        outcome = routed.outcome.as_dict(routed.route)
        if routed.told is not None:
            runs = routed.route.runs(0, num_run, request.all_token_ids) if num_run > 0 else []
            outcome["paths"] = described(runs, self._limits.num_layers)
        return finished_params(freed, outcome)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's step, with the plan attached."""
        self._routing_time.seconds = 0.0
        self._choose_again_for_waiting()
        self._lower_running()
        with self._routing_time:
            self._routes.see_newest((self._routed[r.request_id].route, r.all_token_ids) for r in self.running)
        output = super().schedule(*args, **kwargs)
        with self._routing_time:
            plan = self._plan(output)
            setattr(output, PLAN_ATTRIBUTE, plan)
        if output.num_scheduled_tokens:
            self._metrics.observe_routing(self._routing_time.seconds)
            self._metrics.observe_plan(plan)
            self._step_started = time.perf_counter()
            for new in output.scheduled_new_reqs:
                if (prompt := first_prefill(self.requests[new.req_id])) is not None:
                    self._metrics.observe_prompt(self._routed[new.req_id].outcome.budget, *prompt)
        return output

    def _choose_again_for_waiting(self) -> None:
        """With service objectives, decide "auto" again for what may leave the queue."""
        auto = self._auto
        if auto.meter is None or auto.chooser is None or not self.waiting:
            return
        room = max(0, self.max_num_running_reqs - len(self.running))
        free = (r for r in self.waiting if r.request_id not in auto.blocked)
        with self._routing_time:
            starting, num_tokens = [], 0
            for request in islice(free, min(room, _MOST_STARTING)):
                if num_tokens >= self.max_num_scheduled_tokens:
                    break  # the step has no room for more of them
                starting.append((request, self._routed[request.request_id]))
                num_tokens += request.num_tokens - request.num_computed_tokens
            for request, routed in auto.choose_again(starting):
                routed.route = self._new_route(request, routed.outcome.budget)
                self._prepare_cache(request, routed)

    def _lower_running(self) -> None:
        """Where the load has risen, lower decoding requests of budget "auto".

        This comes before vLLM schedules the step: vLLM publishes the blocks of the tokens that it schedules, according
        to the paths that are decided by then.
        """
        auto = self._auto
        if auto.chooser is None or not auto.lowers_running or auto.chooser.level == 0:
            return
        with self._routing_time:
            auto.lower((r, self._routed[r.request_id]) for r in self.running)

    def _plan(self, output: SchedulerOutput) -> StepPlan:
        starting = {request.req_id for request in output.scheduled_new_reqs}
        self._auto.starts(starting, self.requests)
        starting |= output.scheduled_cached_reqs.resumed_req_ids
        plan: StepPlan = {}
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            request, routed = self.requests[req_id], self._routed[req_id]
            # vLLM has already advanced num_computed_tokens to the end of this step.
            end, first = request.num_computed_tokens, routed.route.first_path if req_id in starting else None
            drafts = output.scheduled_spec_decode_tokens.get(req_id, ())
            if drafts:
                runs = runs_with_drafts(routed.route, end - num_tokens, num_tokens, request.all_token_ids, drafts)
            else:
                runs = routed.route.runs(end - num_tokens, num_tokens, request.all_token_ids)
            routed.planned = max(routed.planned, end - len(drafts))
            num_prompt = max(0, min(end, request.num_prompt_tokens) - (end - num_tokens))
            places = routed.new_places(starts=first is not None)
            plan[req_id] = RequestPlan(tuple(runs), first, num_prompt, len(drafts), places=places)
        if self._drafts.drafting is not None:
            self._drafts.ask(plan, self._room_for_drafts(plan))
        return plan

    def _room_for_drafts(self, plan: StepPlan) -> dict[str, tuple[RequestDrafts, int]]:
        """How many drafts each request of a step may have after it: none before the step that completes a prompt."""
        found = {}
        for req_id in plan:
            request, drafts = self.requests[req_id], self._routed[req_id].drafts
            end = request.num_computed_tokens
            # Without the token of this step, and the one that the next step samples after its drafts.
            room = min(self.max_model_len - end, request.max_tokens - request.num_output_tokens) - 2
            if drafts is not None and end >= request.num_tokens and room > 0:
                found[req_id] = drafts, room
        return found

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """Collect the layers executed, before vLLM finishes the requests of this step."""
        executed: dict[str, Executed] = getattr(model_runner_output, EXECUTED_ATTRIBUTE, {})
        seconds = time.perf_counter() - self._step_started  # drafts are not scheduled asynchronously
        self._drafts.learn(getattr(scheduler_output, PLAN_ATTRIBUTE), executed, seconds)
        checked = scheduler_output.scheduled_spec_decode_tokens
        for req_id, counts in executed.items():
            if (routed := self._routed.get(req_id)) is not None:
                if min(checked.get(req_id, ()), default=0) < 0:
                    counts = counts._replace(drafts=())  # rows that vLLM fills up a first step with
                num_right = _num_right(req_id, model_runner_output) if counts.drafts else 0
                self._drafts.ran(req_id, routed, counts, num_right)
        self._metrics.observe_step(executed.values(), self._limits.num_layers)
        self._auto.gets_token(model_runner_output.req_ids, model_runner_output.sampled_token_ids)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._drafts.drop_rest(self._routed)
        self._tell_paths(outputs)
        return outputs

    def update_draft_token_ids(self, draft_token_ids: "DraftTokenIds") -> None:
        """vLLM's; a draft that a grammar forbids counts as a wrong one."""
        made = dict(zip(draft_token_ids.req_ids, map(len, draft_token_ids.draft_token_ids)))
        super().update_draft_token_ids(draft_token_ids)
        for req_id, num_made in made.items():
            request, routed = self.requests.get(req_id), self._routed.get(req_id)
            if request is not None and routed is not None and not request.is_prefill_chunk:
                self._drafts.allowed(routed, num_made, len(request.spec_token_ids))

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        """Count the drafts that became part of the answer: none after the token that stops the request."""
        kept, stopped = super()._update_request_with_output(request, new_token_ids, *args, **kwargs)
        self._drafts.kept(request.request_id, self._routed.get(request.request_id), len(kept) - 1)
        return kept, stopped

    def _handle_stopped_request(self, request: Request) -> bool:
        """A session goes on after the tokens that it has: vLLM 0.32 also counts drafts accepted after the last one."""
        if request.resumable:
            last = request.num_tokens - 1 + request.num_output_placeholders
            request.num_computed_tokens = min(request.num_computed_tokens, last)
        return super()._handle_stopped_request(request)

    def set_pause_state(self, pause_state: PauseState) -> None:
        """vLLM's; what waits because of it is no load."""
        super().set_pause_state(pause_state)
        self._auto.pauses(pause_state != PauseState.UNPAUSED)

    def make_stats(self, *args: Any, **kwargs: Any) -> "SchedulerStats | None":
        """vLLM's statistics, with our figures. Called at the end of a step, when the requests that ended have left."""
        self._observe_load(idle=not self.has_unfinished_requests())
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            add_figures(stats, self._metrics.take())
        return stats

    def _tell_paths(self, outputs: Any) -> None:
        """Add the paths of the tokens that ran to what vLLM streams of requests that ask for them and go on.

        outputs: as vLLM's update_from_output returns them. Requests that are finished have their whole outcome.
        """
        for output in (output for client in outputs.values() for output in client.outputs):
            routed, request = self._routed.get(output.request_id), self.requests.get(output.request_id)
            if routed is None or request is None or routed.told is None:
                continue
            num_new = request.num_tokens - 1 - routed.told
            if num_new > 0:
                runs = routed.route.runs(routed.told, num_new, request.all_token_ids)
                output.kv_transfer_params = {OUTCOME_KEY: {"paths": described(runs, self._limits.num_layers)}}
                routed.told += num_new

    def _observe_load(self, *, idle: bool) -> None:
        """Let the terms of budget "auto" follow the load: at each arrival that it decides, and after each step.

        The last step before the server runs out of work leaves no load.
        """
        chooser = self._auto.chooser
        if chooser is None:
            return
        num_running, num_waiting = self.get_request_counts()
        # A streaming-input session without input waits for its client, not for the server.
        num_waiting -= self.num_waiting_for_streaming_input
        self._auto.observe(num_waiting, num_running, self.kv_cache_manager.usage, idle=idle)
        self._metrics.show_load(chooser.level, chooser.terms.price)
        if chooser.objectives is not None:
            self._metrics.show_objectives(chooser.objectives, chooser.largest_budget)


class BuddyScheduler(_Routing, Scheduler):
    """Routing over vLLM's synchronous scheduler."""


class BuddyAsyncScheduler(_Routing, AsyncScheduler):
    """Routing over vLLM's asynchronous scheduler; decisions lag one token behind."""


def make_scheduler(vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> Scheduler:
    """Build the routing scheduler of the kind that vLLM would have built. vLLM expects a class here."""
    cls = BuddyAsyncScheduler if vllm_config.scheduler_config.async_scheduling else BuddyScheduler
    return cls(vllm_config, *args, **kwargs)


def _draws_by_seed(request: Request) -> bool:
    """Whether a request is sampled with a seed of its own. It gets no drafts: how many there are follows the clock and
    other requests, and each takes numbers of the seed's, so that the seed would not give the same answer again."""
    params = request.sampling_params
    return params is not None and params.sampling_type is SamplingType.RANDOM_SEED


def _num_right(req_id: str, model_runner_output: Any) -> int:
    """How many of a request's drafts the step confirmed."""
    sampled = model_runner_output.sampled_token_ids
    return max(0, len(sampled[model_runner_output.req_id_to_index[req_id]]) - 1) if sampled else 0


def _decision_lag(settings: BuddySettings, vllm_config: "VllmConfig") -> int:
    least = 1 if vllm_config.scheduler_config.async_scheduling else 0
    return max(settings.decision_lag or 0, least)
