"""The routing scheduler, synchronous and asynchronous, against a worker that only keeps books."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from tests.harness.batches import CONTEXTS, PROMPTS, SCENARIO_BUDGETS, ask_with
from tests.harness.engine import BLOCK_SIZE, MAX_TOKENS_PER_STEP, Ask, Tiny, paths_told
from tests.harness.pretend_worker import PretendEngine
from tests.harness.tiny_models import NUM_LAYERS, random_prompts
from vllm_buddy.method import PathSchedule
from vllm_buddy.serving.schedule.plan import PLAN_ATTRIBUTE

scenarios = given(
    interval=st.sampled_from((0, 1, 4, 16)),
    lag=st.sampled_from((0, 0, 1, 3)),
    num_blocks=st.sampled_from((17, 24, 200)),
    chunk=st.sampled_from((5, 33, 64, MAX_TOKENS_PER_STEP)),
    requests=st.lists(
        st.tuples(
            st.builds(
                ask_with,
                st.sampled_from(PROMPTS),
                st.sampled_from(SCENARIO_BUDGETS),
                st.sampled_from((1, 9, 40, 70)),
                st.sampled_from(CONTEXTS),
            ),
            st.integers(0, 20),
            # Whether another request follows that has the generated tokens in its prompt.
            st.booleans(),
        ),
        min_size=1,
        max_size=8,
    ),
    events=st.lists(
        st.tuples(st.integers(1, 60), st.sampled_from(("late", "drop", "all", "abort")), st.integers(0, 5)), max_size=5
    ),
)


def check_scenario(
    tiny: Tiny, asynchronous: bool, interval, lag, num_blocks, chunk, requests, events, *, units: bool = False
) -> int:
    """Serve and compare; returns the number of tokens found in the cache."""
    engine = PretendEngine(
        tiny,
        PathSchedule(interval, lag),
        asynchronous=asynchronous,
        num_blocks=(num_blocks - 1) * NUM_LAYERS // 2 + 1 if units else num_blocks,
        chunk=chunk,
        buddy={"kv_layout": "units", "kv_classes": 2} if units else None,
    )
    scheduler, aborted, followed = engine.scheduler, set(), set()
    for step in range(3000):
        for ask, arrival, _ in requests:
            if arrival == step:
                engine.add(ask)
        for at, kind, index in events:
            if at == step and kind == "all":
                scheduler.reset_prefix_cache(reset_running_requests=True)
            elif at == step and kind in ("late", "drop"):
                engine.preempt(index, drop_stale_output=kind == "drop")
            elif at == step and scheduler.running:
                request = scheduler.running[index % len(scheduler.running)]
                aborted.add(request.request_id)
                scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
        follow(engine, [ask for ask, _, wanted in requests if wanted], followed)
        engine.step()
        if step > 20 and engine.idle:
            break
    assert engine.idle
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "a block is lost"
    for request_id, ask in engine.asks.items():
        if request_id not in aborted:
            assert engine.generated[request_id] == engine.expected(ask)
    return engine.cache_hits


def follow(engine: PretendEngine, asks: list[Ask], followed: set[int]) -> None:
    """Send, once, the text of a request that has got far as another request's prompt."""
    for number, ask in enumerate(asks):
        for request_id, generated in list(engine.generated.items()):
            if number not in followed and engine.asks[request_id] is ask and len(generated) >= 36:
                followed.add(number)
                engine.add(Ask((*ask.prompt, *generated), ask.budget, 2))


_FEW = settings(max_examples=100, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("asynchronous", [False, True], ids=("sync", "async"))
def test_every_block_found_in_the_cache_is_what_the_request_would_compute(
    tiny: Callable[[str], Tiny], asynchronous: bool
) -> None:
    """Fails if a plan depends on when tokens arrive, or a request finds blocks of other tokens or another path."""
    hits = 0

    @_FEW
    @scenarios
    def check(**scenario) -> None:  # type: ignore[no-untyped-def]
        nonlocal hits
        hits += check_scenario(tiny("llama"), asynchronous, **scenario)

    check()
    assert hits > 1000


@pytest.mark.parametrize("asynchronous", [False, True], ids=("sync", "async"))
def test_with_units_every_layer_holds_what_its_tokens_stored(tiny: Callable[[str], Tiny], asynchronous: bool) -> None:
    """Fails if a block is given out twice or too late, or a layer is looked for in another unit than it lies in."""
    hits = 0

    @settings(_FEW, max_examples=60)
    @scenarios
    def check(**scenario) -> None:  # type: ignore[no-untyped-def]
        nonlocal hits
        hits += check_scenario(tiny("llama"), asynchronous, **scenario, units=True)

    check()
    assert hits > 500


@pytest.mark.parametrize("asynchronous", [False, True], ids=("sync", "async"))
def test_a_request_preempted_right_at_its_change_of_path_takes_no_block_beyond_it(
    tiny: Callable[[str], Tiny], asynchronous: bool
) -> None:
    """Fails if the hash of the block in which a request leaves its path outlives the decision to leave it.

    Under asynchronous scheduling the token that fills the block arrives a step after its path was decided.
    """
    engine = PretendEngine(
        tiny("llama"), PathSchedule(1, 1), asynchronous=asynchronous, num_blocks=50, chunk=MAX_TOKENS_PER_STEP
    )
    leaver, sharer = leaves_with_the_last_token_of_a_block(engine)
    engine.add(sharer)
    while not engine.idle:
        engine.step()
    leaver_id = engine.add(leaver)
    while len(engine.generated[leaver_id]) < 2:
        engine.step()
    engine.preempt(0, drop_stale_output=False)
    while not engine.idle:
        engine.step()
    assert engine.generated[leaver_id] == engine.expected(leaver)


@pytest.mark.parametrize("asynchronous", [False, True], ids=("sync", "async"))
def test_paths_told_as_a_request_goes_on_add_up_to_the_whole(tiny: Callable[[str], Tiny], asynchronous: bool) -> None:
    """Fails if a token's path is told twice, not at all, or before it is known; chunks and preemption included."""
    engine = PretendEngine(tiny("llama"), PathSchedule(4, 1), asynchronous=asynchronous, num_blocks=50, chunk=16)
    ask = Ask(PROMPTS[0], 0.5, 40, options={"buddy_paths": True})
    asked, silent = engine.add(ask), engine.add(Ask(PROMPTS[1], 0.5, 40))
    while not engine.idle:
        engine.step()
        if len(engine.generated[asked]) == 11:
            engine.preempt(0, drop_stale_output=False)
    tokens = (*ask.prompt, *engine.generated[asked])
    expected = engine.paths(ask, tokens)[:-1]
    *parts, whole = (paths_told(told["paths"]) for told in engine.told[asked])
    assert whole == expected
    streamed = [path for part in parts for path in part]
    assert streamed == expected[: len(streamed)]
    assert len(streamed) == len(expected) - 1  # the last step is told with the whole
    assert ["paths" in told for told in engine.told[silent]] == [False]


def test_paths_are_told_where_the_last_token_arrives_after_a_preemption(tiny: Callable[[str], Tiny]) -> None:
    """Fails if a request that vLLM finishes from a step in flight is said to have run nothing."""
    engine = PretendEngine(tiny("llama"), PathSchedule(0), asynchronous=True, num_blocks=50, chunk=MAX_TOKENS_PER_STEP)
    ask = Ask(PROMPTS[0], 0.5, 6, options={"buddy_paths": True})
    asked = engine.add(ask)
    while len(engine.generated[asked]) < 5:
        engine.step()
    engine.preempt(0, drop_stale_output=False)
    while not engine.idle:
        engine.step()
    tokens = (*ask.prompt, *engine.generated[asked])
    assert paths_told(engine.told[asked][-1]["paths"]) == engine.paths(ask, tokens)[:-1]


@pytest.mark.parametrize("in_prompts", [True, False])
def test_masked_tokens_of_many_depths_are_shared_up_to_the_first_change(
    tiny: Callable[[str], Tiny], in_prompts: bool
) -> None:
    """Fails if a worker is told of tokens in the cache that they ran one path, and they did not."""
    by_token = {"prefill": "token" if in_prompts else "request", "decode": "token"}
    engine = PretendEngine(
        tiny("llama"),
        PathSchedule(0),
        asynchronous=False,
        num_blocks=100,
        chunk=MAX_TOKENS_PER_STEP,
        buddy={"schedule": by_token, "kv_policy": "masked"},
    )
    found = beyond = 0
    for seed in range(12):
        # One token again and again runs one path beyond a block, other tokens end it.
        prompt = [seed] * (BLOCK_SIZE + 8) + random_prompts(1, seed=seed, min_tokens=56, max_tokens=56)[0]
        for _ in range(2):
            request = engine.request(Ask(tuple(prompt), 0.75, 1))
            engine.scheduler.add_request(request)
            output = engine.scheduler.schedule()
            plan = getattr(output, PLAN_ATTRIBUTE)[request.request_id]
            cached = output.scheduled_new_reqs[0].num_computed_tokens
            route = engine.scheduler._routed[request.request_id].route
            runs = route.runs(0, cached, prompt) if cached else []
            assert {run.path for run in runs} <= {plan.cached_path}
            found += cached
            beyond += cached > 0 and len(route.runs(0, len(prompt), prompt)) > 1
            engine.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    assert found > 0
    assert (beyond > 0) == in_prompts, "of prompts of many paths, some beginning is shared"


@pytest.mark.parametrize(("kv_policy", "when"), [("kv_only", "arrives"), ("masked", "is hashed")])
def test_depths_of_a_prompt_are_decided_as_it_is_computed(
    tiny: Callable[[str], Tiny], kv_policy: str, when: str
) -> None:
    """Fails if a long prompt holds up the scheduler where it arrives, though no block depends on what it decides; or if
    blocks are hashed beyond a change of path."""
    buddy = {"schedule": {"prefill": "token", "decode": "token"}, "kv_policy": kv_policy}
    engine = PretendEngine(tiny("llama"), PathSchedule(0), asynchronous=False, num_blocks=50, chunk=8, buddy=buddy)
    request = engine.request(Ask(max(PROMPTS, key=len), 0.5, 2))
    engine.scheduler.add_request(request)
    route = engine.scheduler._routed[request.request_id].route
    assert route.num_decisions == (1 if when == "arrives" else request.num_tokens)


def test_a_session_goes_on_after_the_tokens_that_it_has(tiny: Callable[[str], Tiny]) -> None:
    """Fails if drafts that were accepted after the token that ended a turn count as part of the next one."""
    engine = PretendEngine(tiny("llama"), PathSchedule(0), asynchronous=False, num_blocks=50, chunk=MAX_TOKENS_PER_STEP)
    session = engine.request(Ask(PROMPTS[0], None, 9))
    session.resumable = True
    engine.scheduler.add_request(session)
    engine.scheduler.schedule()
    session.append_output_token_ids([3, 4])
    session.num_computed_tokens = session.num_tokens + 2
    assert not engine.scheduler._handle_stopped_request(session)
    assert session.num_computed_tokens == session.num_tokens - 1


def leaves_with_the_last_token_of_a_block(engine: PretendEngine) -> tuple[Ask, Ask]:
    """A request whose path changes at the last position of its first block, and one that has that block on one path."""
    for seed in range(1000):
        prompt = tuple(random_prompts(1, seed=seed, min_tokens=BLOCK_SIZE - 2, max_tokens=BLOCK_SIZE - 2)[0])
        leaver = Ask(prompt, 0.5, 8)
        tokens = (*prompt, *engine.expected(leaver))
        before, at = engine.paths(leaver, tokens)[BLOCK_SIZE - 2 : BLOCK_SIZE]
        sharer = Ask(tokens[: BLOCK_SIZE + 1], 0.5, 1)
        if before != at and before == engine.paths(leaver, tokens)[0] == engine.paths(sharer, tokens)[0]:
            return leaver, sharer
    raise AssertionError("no such pair among 1000 prompts")


@pytest.mark.slow
@pytest.mark.parametrize("units", [False, True], ids=("dense", "units"))
@pytest.mark.parametrize("asynchronous", [False, True], ids=("sync", "async"))
def test_the_same_in_many_more_scenarios(tiny: Callable[[str], Tiny], asynchronous: bool, units: bool) -> None:
    """The same with twenty times the scenarios."""

    @settings(_FEW, max_examples=2000)
    @scenarios
    def check(**scenario) -> None:  # type: ignore[no-untyped-def]
        check_scenario(tiny("llama"), asynchronous, **scenario, units=units)

    check()
