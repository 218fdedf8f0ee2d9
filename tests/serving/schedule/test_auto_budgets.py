"""What is load to a scheduler and what is not, and which requests are decided again when it has changed."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any
from unittest.mock import Mock

import pytest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.request import StructuredOutputRequest

from tests.harness.batches import PROMPTS
from tests.harness.engine import MAX_TOKENS_PER_STEP, Ask, Tiny
from tests.harness.pretend_worker import PretendEngine
from tests.harness.tiny_models import NUM_LAYERS, PREDICTOR_DEPTHS
from vllm_buddy.method import PathSchedule
from vllm_buddy.serving.admission.latency import LatencyMeter


def make_engine(tiny: Callable[[str], Tiny], buddy: dict[str, Any], interval: int = 0) -> PretendEngine:
    """A synchronous one with few blocks."""
    return PretendEngine(
        tiny("llama"), PathSchedule(interval), asynchronous=False, num_blocks=50, chunk=MAX_TOKENS_PER_STEP, buddy=buddy
    )


def own_clock(scheduler: Any) -> list[float]:
    """Let latencies follow a clock that a test sets; returns its one number, in seconds."""
    now = [100.0]
    if scheduler._auto.meter is not None:
        scheduler._auto.meter = LatencyMeter(lambda: now[0])
    return now


def with_grammar(request: Request) -> Future[StructuredOutputGrammar]:
    """Let a request wait for a grammar, as vLLM's constructor does; returns what gives it."""
    assert request.sampling_params is not None
    request.sampling_params.structured_outputs = StructuredOutputsParams(regex="a")
    asked = request.structured_output_request = StructuredOutputRequest.from_sampling_params(request.sampling_params)
    assert asked is not None
    request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    grammar: Future[StructuredOutputGrammar] = Future()
    asked.grammar = grammar
    return grammar


@pytest.mark.parametrize("buddy", [{"slo": {"ttft_ms": 1}}, {"load": {"price": 50.0}}], ids=str)
def test_requests_that_wait_for_their_grammar_are_no_load(tiny: Callable[[str], Tiny], buddy: dict[str, Any]) -> None:
    """Fails if slow grammars of one client make all others' answers shallower, which shortens no wait, or the queue of
    a full server is no load because its requests have grammars: vLLM leaves their status until there is room."""
    scheduler = (engine := make_engine(tiny, buddy)).scheduler
    now = own_clock(scheduler)
    scheduler.max_num_running_reqs = scheduler.max_num_active_reqs = 0
    blocked = [engine.request(Ask(PROMPTS[0], "auto", 4)) for _ in range(40)]
    grammars = [with_grammar(request) for request in blocked]
    for request in blocked:
        scheduler.add_request(request)
    now[0] += 0.05
    scheduler._observe_load(idle=False)
    assert scheduler._auto.chooser.level == 0
    for grammar in grammars[:20]:
        grammar.set_result(Mock())
    scheduler.schedule()
    assert {request.status for request in blocked} == {RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR}
    assert len(scheduler._auto.blocked) == 20
    now[0] += 0.05
    scheduler._observe_load(idle=False)
    assert scheduler._auto.chooser.level > 0
    scheduler.finish_requests([request.request_id for request in blocked], RequestStatus.FINISHED_ABORTED)
    assert not scheduler._auto.blocked


def test_a_session_that_had_to_wait_for_a_grammar_is_no_load_either(tiny: Callable[[str], Tiny]) -> None:
    """Fails if the time that a client thinks becomes a time between tokens because its session has a grammar."""
    scheduler = (engine := make_engine(tiny, {"slo": {"itl_ms": 50}})).scheduler
    session = engine.request(Ask(PROMPTS[0], None, 2))
    session.resumable = True
    grammar = with_grammar(session)
    scheduler.add_request(session)
    grammar.set_result(Mock())
    scheduler._auto.unblock(scheduler.requests)
    assert not scheduler._auto.blocked
    scheduler._auto.starts([session.request_id], scheduler.requests)
    for _ in range(2):
        scheduler._auto.gets_token([session.request_id], [[1]])
    assert not scheduler._auto.meter.take().itls


@pytest.mark.parametrize("state", [PauseState.PAUSED_NEW, PauseState.PAUSED_ALL], ids=lambda state: state.name)
@pytest.mark.parametrize(
    "buddy", [{"slo": {"ttft_ms": 1, "itl_ms": 20}}, {"load": {"price": 50.0}}], ids=("objectives", "load")
)
def test_an_operators_pause_is_no_load(tiny: Callable[[str], Tiny], buddy: dict[str, Any], state: PauseState) -> None:
    """Fails if requests are lowered for good because an operator held up the queue for a while."""
    scheduler = (engine := make_engine(tiny, buddy)).scheduler
    now = own_clock(scheduler)
    running = engine.add(Ask(PROMPTS[1], 1.0, 40))
    engine.step()
    scheduler.set_pause_state(state)
    for _ in range(20):
        scheduler.add_request(engine.request(Ask(PROMPTS[0], "auto", 4)))
    now[0] += 0.05
    scheduler._observe_load(idle=False)
    assert scheduler._auto.chooser.level == 0
    scheduler.max_num_running_reqs = 1
    scheduler.set_pause_state(PauseState.UNPAUSED)
    if "slo" in buddy:
        assert scheduler._auto.meter.take().wait_s < 0.05
        scheduler._auto.gets_token([running], [[1]])
        assert max(scheduler._auto.meter.take().itls) < 0.05
    now[0] += 0.05
    scheduler._observe_load(idle=False)
    assert scheduler._auto.chooser.level > 0


@pytest.mark.parametrize("buddy", [{"slo": {"ttft_ms": 0.001}}, {"load": {"price": 50.0}}], ids=str)
def test_sessions_that_wait_for_their_client_are_no_load(tiny: Callable[[str], Tiny], buddy: dict[str, Any]) -> None:
    """Fails if clients that think about their next input make all others' answers shallower."""
    scheduler = (engine := make_engine(tiny, buddy)).scheduler
    sessions = [engine.request(Ask(PROMPTS[0], None, 2)) for _ in range(6)]
    for session in sessions:
        session.resumable = True
        scheduler.add_request(session)
        engine.expect(session.request_id, Ask(PROMPTS[0], None, 2))
        engine.generated[session.request_id] = []
    for _ in range(10):
        engine.step()
    assert {session.status for session in sessions} == {RequestStatus.WAITING_FOR_STREAMING_REQ}
    scheduler._observe_load(idle=False)
    assert scheduler._auto.chooser.level == 0
    waiting = [engine.request(Ask(PROMPTS[0], "auto", 4)) for _ in range(6)]
    for request in waiting:
        scheduler.add_request(request)
    scheduler._observe_load(idle=False)
    assert scheduler._auto.chooser.level > 0


_SPLIT = {"schedule": {"prefill": "request", "decode": "token"}, "kv_policy": "masked"}


@pytest.mark.parametrize(
    ("options", "buddy", "interval"),
    [
        ({"buddy_prompt": "routed"}, {}, 0),
        ({"buddy_prompt": "full"}, {}, 0),
        ({}, _SPLIT, 0),  # its block hashes end with the prompt
        ({"buddy_context_tokens": 2}, {}, 1),  # and here within it
    ],
    ids=("routed", "full", "decode by token", "paths change in the prompt"),
)
def test_a_request_that_leaves_the_queue_is_decided_again(
    tiny: Callable[[str], Tiny], options: dict[str, Any], buddy: dict[str, Any], interval: int
) -> None:
    """Fails if a burst keeps the depth of the calm before it, or what is decided again is not what a new request at its
    budget is, block hashes included."""
    scheduler = (engine := make_engine(tiny, {"slo": {"ttft_ms": 1}, **buddy}, interval)).scheduler
    prompt = max(PROMPTS, key=len)
    request = engine.request(Ask(prompt, "auto", 4, options=options))
    scheduler.add_request(request)
    routed = scheduler._routed[request.request_id]
    before = routed.outcome.depth
    scheduler._auto.chooser._ceiling.depth = PREDICTOR_DEPTHS[0]
    scheduler._choose_again_for_waiting()
    assert routed.outcome.depth < before
    assert routed.route.depth == routed.outcome.depth
    other = engine.request(Ask(prompt, routed.outcome.budget, 4, options=options))
    scheduler.add_request(other)
    assert request.block_hashes == other.block_hashes
    assert request.cache_salt == other.cache_salt
    assert (routed.hasher is None) == (scheduler._routed[other.request_id].hasher is None)


def test_a_request_is_hashed_once_for_each_path(tiny: Callable[[str], Tiny]) -> None:
    """Fails if deciding again hashes a long prompt twice, or a request without a salt is hashed at all."""
    scheduler = (engine := make_engine(tiny, {"slo": {"ttft_ms": 1}, "auto": {"price": 0.0}})).scheduler
    request = engine.request(Ask(max(PROMPTS, key=len), "auto", 4))
    request._block_hasher = Mock(wraps=request._block_hasher)
    scheduler.add_request(request)
    assert scheduler._routed[request.request_id].outcome.depth == NUM_LAYERS
    assert request._block_hasher.call_count == 0
    scheduler._auto.chooser._ceiling.depth = PREDICTOR_DEPTHS[0]
    scheduler._choose_again_for_waiting()
    assert scheduler._routed[request.request_id].outcome.depth < NUM_LAYERS
    assert request._block_hasher.call_count == 1


@pytest.mark.parametrize(("limit", "num_again"), [(0, 0), (1, 0), (2, 1), (3, 2)])
def test_only_what_there_is_room_for_is_decided_again(tiny: Callable[[str], Tiny], limit: int, num_again: int) -> None:
    """Fails if each step decides again for the whole queue, or none can be made where more run than may."""
    scheduler = (engine := make_engine(tiny, {"slo": {"ttft_ms": 1e6}})).scheduler
    scheduler.max_num_running_reqs = 1
    running = engine.add(Ask(PROMPTS[1], 1.0, 9))
    engine.step()
    waiting = [engine.request(Ask(PROMPTS[0], "auto", 9)) for _ in range(3)]
    for request in waiting:
        scheduler.add_request(request)
    assert [request.request_id for request in scheduler.running] == [running]
    before = scheduler._routed[waiting[0].request_id].outcome.depth
    scheduler.max_num_running_reqs = limit
    scheduler._auto.chooser._ceiling.depth = PREDICTOR_DEPTHS[0]
    scheduler._choose_again_for_waiting()
    depths = [scheduler._routed[request.request_id].outcome.depth for request in waiting]
    assert [depth < before for depth in depths] == [number < num_again for number in range(3)]


def test_no_more_is_decided_again_than_a_step_has_room_for(
    tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a queue of long prompts is routed and hashed again in every step, of which each takes in one."""
    scheduler = (engine := make_engine(tiny, {"slo": {"ttft_ms": 1}})).scheduler
    prompt = tuple(range(20, 60))
    for _ in range(8):
        scheduler.add_request(engine.request(Ask(prompt, "auto", 4)))
    looked_at: list[int] = []
    monkeypatch.setattr(scheduler._auto, "choose_again", lambda starting: looked_at.append(len(starting)) or ())
    for room in (len(prompt), 3 * len(prompt) - 1, 100 * len(prompt)):
        scheduler.max_num_scheduled_tokens = room
        scheduler._choose_again_for_waiting()
    assert looked_at == [1, 3, 8]
