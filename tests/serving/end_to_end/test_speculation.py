"""With any drafts, right or wrong, requests get the tokens and layers that they get without."""

import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from tests.harness import oracle_drafter
from tests.harness.engine import Ask, ByToken, Engine, Tiny, start_engine
from tests.harness.model_runner_v2 import RUNNER
from tests.harness.oracle_drafter import OracleDrafter
from tests.serving.end_to_end.test_golden import batch
from vllm_buddy.method.kv_policy import KV_ONLY, KV_POLICIES, MASKED


@pytest.fixture(scope="session")
def drafted_of(tiny: Callable[[str], Tiny]) -> Callable[[str], Engine]:
    """The routed engine of a family with drafts, started once."""
    started: dict[str, Engine] = {}

    def get(family: str) -> Engine:
        if family not in started:
            started[family] = start_engine(tiny(family), speculative_config=dict(oracle_drafter.CONFIG))
        return started[family]

    return get


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def drafted(request: pytest.FixtureRequest, drafted_of: Callable[[str], Engine]) -> Iterator[Engine]:
    engine = drafted_of(request.param)
    yield engine
    engine.abort_all()


@pytest.fixture
def llama_drafted(drafted_of: Callable[[str], Engine]) -> Iterator[Engine]:
    engine = drafted_of("llama")
    yield engine
    engine.abort_all()


def draft_answers(engine: Engine, asks: Sequence[Ask], seed: int = 0, accuracy: float = 0.7) -> None:
    """Let the drafter know the reference's answers."""
    answers = {ask.prompt: [*ask.prompt, *engine.expected(ask).token_ids] for ask in asks}
    OracleDrafter.answers, OracleDrafter.accuracy = answers, accuracy
    OracleDrafter.rng = np.random.default_rng(seed)


def check(engine: Engine, asks: Sequence[Ask], outputs: Sequence[object]) -> None:
    """As Engine.check, and some drafts were accepted and some rejected."""
    engine.check(asks, outputs)
    outcomes = [output.kv_transfer_params["buddy"] for output in outputs]  # type: ignore[attr-defined]
    assert 0 < sum(o["accepted"] for o in outcomes) < sum(o["drafted"] for o in outcomes)


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("interval", [0, 1, 16])
def test_tokens_with_drafts_equal_the_reference(drafted: Engine, policy: str, interval: int) -> None:
    """Fails if a rejected draft leaves KV, a decision or a count behind."""
    drafted.configure(policy, interval)
    asks = batch(seed=interval)
    draft_answers(drafted, asks)
    check(drafted, asks, drafted.run(asks))


@pytest.mark.parametrize("by_token", [(True, True), (False, True)], ids=("both", "decode"))
@pytest.mark.parametrize("policy", [KV_ONLY, MASKED])
def test_tokens_with_depths_of_their_own_and_drafts(drafted: Engine, policy: str, by_token: ByToken) -> None:
    """Fails if the account of a request pays for drafts that were rejected."""
    drafted.configure(policy, 4, by_token=by_token)
    asks = batch(seed=6)
    draft_answers(drafted, asks)
    check(drafted, asks, drafted.run(asks))


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_drafts_beside_chunks_preemption_and_cache_hits(llama_drafted: Engine, policy: str) -> None:
    """Fails if what a preempted or cached request is computed from depends on its drafts."""
    engine = llama_drafted
    engine.configure(policy, 1, chunk=33)
    asks = [Ask(ask.prompt * 2, ask.budget, 40) for ask in batch(seed=7)]
    draft_answers(engine, asks)

    def disturb(step: int) -> None:
        if step % 5 == 2:
            engine.preempt(step)
        if step == 13:
            engine.preempt_all()

    check(engine, asks, engine.run(asks, before_step=disturb))
    draft_answers(engine, asks, seed=1, accuracy=0.4)
    outputs = engine.run(asks)
    check(engine, asks, outputs)
    assert any(output.num_cached_tokens for output in outputs)


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_drafts_that_are_all_wrong_or_all_right(llama_drafted: Engine, accuracy: float) -> None:
    """Fails at the ends: nothing to keep of a step but one token, or nothing to take back."""
    engine = llama_drafted
    engine.configure("masked", 1)
    asks = batch(seed=8)
    draft_answers(engine, asks, accuracy=accuracy)
    outputs = engine.run(asks)
    engine.check(asks, outputs)
    outcomes = [output.kv_transfer_params["buddy"] for output in outputs]
    assert sum(o["accepted"] for o in outcomes) == accuracy * sum(o["drafted"] for o in outcomes) > -1
    assert all((o["layers_drafting_mean"] == 0) == (accuracy == 1.0) for o in outcomes)


def test_sampled_requests_are_seeded_alike_with_drafts_of_others(llama_drafted: Engine) -> None:
    """Fails if a request's own tokens change because another one in the batch is drafted for."""
    engine = llama_drafted
    engine.configure("masked", 4)
    sampled = Ask(batch(seed=9)[1].prompt, 0.5, 20, {"temperature": 1.0, "seed": 3})
    OracleDrafter.answers = {}
    alone = engine.run([sampled])[0].outputs[0].token_ids
    others = batch(seed=10)
    draft_answers(engine, others)
    outputs = engine.run([*others, sampled])
    check(engine, others, outputs[:-1])
    assert outputs[-1].outputs[0].token_ids == alone


@pytest.fixture
def without_numba_afterwards() -> Iterator[None]:
    """vLLM looks for kernels in all modules when it starts an engine, and fails on some of numba's."""
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("numba", "llvmlite")]:
        del sys.modules[name]


@pytest.mark.usefixtures("without_numba_afterwards")
@pytest.mark.parametrize("method", ["draft_model", pytest.param("ngram", marks=pytest.mark.slow)])
def test_vllms_own_speculators(tiny: Callable[[str], Tiny], method: str) -> None:
    """Fails if routing breaks what vLLM's speculators read of the runner, or they break what the routes know."""
    if method == "ngram" and RUNNER != "v1":
        pytest.skip("the n-gram kernel of Model Runner V2 does not run in Triton's interpreter")
    made = tiny("llama")
    speculators = {
        "ngram": {"prompt_lookup_max": 3, "prompt_lookup_min": 1},
        "draft_model": {"model": str(made.folder)},
    }
    config = {"method": method, "num_speculative_tokens": 3, **speculators[method]}
    engine = start_engine(made, speculative_config=config)
    for policy in (MASKED, KV_ONLY):
        engine.configure(policy, 1)
        asks = batch(seed=1)
        check(engine, asks, engine.run(asks))
