"""Batches of requests at mixed budgets, and random scenarios of what happens beside a request."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness.engine import MAX_TOKENS_PER_STEP, Ask, Engine
from tests.harness.tiny_models import random_prompts
from vllm_buddy.method.kv_policy import KV_POLICIES

# 0.4 is the smallest budget of 8 layers: 3 layers. Mixed depths, and two requests share one.
BUDGETS = (1.0, 0.5, 0.75, 0.4, 0.625, 0.5, 0.875, 0.4)
NUM_TOKENS = 20  # beyond the second decision at R = 16


def batch(seed: int, max_prompt: int = 100) -> list[Ask]:
    """Eight requests of different prompt lengths and budgets."""
    prompts = random_prompts(len(BUDGETS), seed=seed, min_tokens=1, max_tokens=max_prompt)
    return [Ask(tuple(p), b, NUM_TOKENS) for p, b in zip(prompts, BUDGETS)]


_BUDGETS_TO_PREEMPT = (0.5, 1.0, 0.75, 0.4, 0.5, 0.625)


def batch_to_preempt(num_tokens: int = 24, seed: int = 21, max_prompt: int = 90) -> list[Ask]:
    """Six requests whose answers are long enough to be preempted on the way."""
    prompts = random_prompts(len(_BUDGETS_TO_PREEMPT), seed=seed, min_tokens=3, max_tokens=max_prompt)
    return [Ask(tuple(p), b, num_tokens) for p, b in zip(prompts, _BUDGETS_TO_PREEMPT)]


# Few values of each, so that requests meet in the cache and the reference is asked the same again. Prompts share
# beginnings of one, two and three blocks, and lengths lie around the block size of 32.
_LONG = random_prompts(2, seed=41, min_tokens=110, max_tokens=110)
_TAILS = random_prompts(3, seed=42, min_tokens=3, max_tokens=30)
PROMPTS = [tuple(long[:n]) for long in _LONG for n in (1, 31, 32, 33, 64, 97, 110)] + [
    tuple(_LONG[0][:shared] + tail) for shared in (32, 70) for tail in _TAILS
]
SCENARIO_BUDGETS = (1.0, 0.75, 0.5, 0.4)
_SCENARIO_LENGTHS = (1, 9, 24)


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
    st.sampled_from(SCENARIO_BUDGETS),
    st.sampled_from(_SCENARIO_LENGTHS),
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
