"""A request's tokens depend on its prompt, its budget and the settings, and on nothing that happens beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness.engine import MAX_TOKENS_PER_STEP, Ask, Engine
from tests.harness.tiny_models import FAMILIES, random_prompts
from vllm_buddy.method.kv_policy import KV_POLICIES

# Few values of each, so that requests meet in the cache and the reference is asked the same again. Prompts share
# beginnings of one, two and three blocks, and lengths lie around the block size of 32.
_LONG = random_prompts(2, seed=41, min_tokens=110, max_tokens=110)
_TAILS = random_prompts(3, seed=42, min_tokens=3, max_tokens=30)
PROMPTS = [tuple(long[:n]) for long in _LONG for n in (1, 31, 32, 33, 64, 97, 110)] + [
    tuple(_LONG[0][:shared] + tail) for shared in (32, 70) for tail in _TAILS
]
BUDGETS = (1.0, 0.75, 0.5, 0.4)
NUM_TOKENS = (1, 9, 24)


@dataclass(frozen=True)
class Disturbance:
    """Something that happens before a step: `kind` is preempt, preempt_all or abort."""

    step: int
    kind: str
    index: int


def ask_with(prompt: tuple[int, ...], budget: float, num_tokens: int, context: int | None) -> Ask:
    return Ask(prompt, budget, num_tokens, context=context and min(context, len(prompt)))


CONTEXTS = (None, None, None, 8, 40)
asks = st.builds(
    ask_with,
    st.sampled_from(PROMPTS),
    st.sampled_from(BUDGETS),
    st.sampled_from(NUM_TOKENS),
    st.sampled_from(CONTEXTS),
)
disturbances = st.builds(
    Disturbance,
    st.integers(1, 40),
    st.sampled_from(("preempt", "preempt", "preempt_all", "abort")),
    st.integers(0, 5),
)
scenarios = given(
    policy=st.sampled_from(KV_POLICIES),
    interval=st.sampled_from((0, 1, 4, 16)),
    lag=st.sampled_from((0, 0, 1, 3)),
    chunk=st.sampled_from((5, 7, 33, 64, MAX_TOKENS_PER_STEP)),
    requests=st.lists(st.tuples(asks, st.integers(0, 12)), min_size=1, max_size=8),
    events=st.lists(disturbances, max_size=4),
)


def check_scenario(
    engine: Engine,
    policy: str,
    interval: int,
    lag: int,
    chunk: int,
    requests: list[tuple[Ask, int]],
    events: list[Disturbance],
    prepare: Callable[[Engine], Any] = lambda engine: None,
) -> None:
    """Serve `requests` (with the step each arrives before) among `events`; compare those not aborted.

    prepare: called when the engine is configured.
    """
    engine.abort_all()
    engine.configure(policy, interval, lag, chunk)
    prepare(engine)
    sent: dict[int, str] = {}
    aborted: set[int] = set()
    for step in range(2000):
        for index, (ask, arrival) in enumerate(requests):
            if arrival == step:
                sent[index] = engine.add(ask)
        for event in events:
            if event.step != step:
                continue
            if event.kind == "preempt":
                engine.preempt(event.index)
            elif event.kind == "preempt_all":
                engine.preempt_all()
            elif event.index in sent and sent[event.index] not in engine.finished:
                engine.abort(sent[event.index])
                aborted.add(event.index)
        engine.step()
        if len(sent) == len(requests) and not engine.llm.llm_engine.has_unfinished_requests():
            break
    whole = [index for index in range(len(requests)) if index not in aborted]
    engine.check([requests[i][0] for i in whole], [engine.finished.pop(sent[i]) for i in whole])
    assert not engine.finished


# One random choice of examples, always the same: a failure is found again by running the test again.
FEW = settings(max_examples=40, suppress_health_check=list(HealthCheck))
_MANY = settings(FEW, max_examples=400)


@FEW
@scenarios
def test_tokens_do_not_depend_on_what_happens_beside_a_request(engine_of: Callable[[str], Engine], **scenario) -> None:
    """Fails if batch-mates, arrival order, chunking, cache state, preemption or aborts change a request's tokens."""
    check_scenario(engine_of("llama"), **scenario)


@FEW
@scenarios
def test_tokens_do_not_depend_on_it_when_blocks_run_out_either(crowded: Engine, **scenario) -> None:
    """The same with so few KV blocks that vLLM preempts, evicts cached blocks and gives them to others."""
    check_scenario(crowded, **scenario)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "crowded"])
def test_tokens_do_not_depend_on_it_in_many_more_scenarios(
    family: str, engine_of: Callable[[str], Engine], crowded: Engine
) -> None:
    """The same for every family, with ten times the scenarios."""
    engine = crowded if family == "crowded" else engine_of(family)

    @_MANY
    @scenarios
    def check(**scenario) -> None:  # type: ignore[no-untyped-def]
        check_scenario(engine, **scenario)

    check()
