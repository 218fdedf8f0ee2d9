"""With any drafts, right or wrong, requests get the tokens and layers that they get without."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from tests.harness import oracle_drafter
from tests.harness.batches import batch
from tests.harness.engine import BLOCK_SIZE, Ask, ByToken, Engine, Tiny, start_engine
from tests.harness.model_runner_v2 import RUNNER
from tests.harness.oracle_drafter import NUM_DRAFTS, OracleDrafter
from tests.harness.tiny_heads import AUXILIARY_LAYERS, EAGLE, EAGLE3, save_head
from tests.harness.tiny_models import random_prompts
from vllm_buddy.method.kv_policy import KV_ONLY, KV_POLICIES, MASKED
from vllm_buddy.method.reference import routed_logits


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


@pytest.fixture(scope="module")
def without_numba_afterwards() -> Iterator[None]:
    """vLLM looks for kernels in all modules when it starts an engine, and fails on some of numba's."""
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("numba", "llvmlite")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def speculating(
    tiny: Callable[[str], Tiny],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    without_numba_afterwards: None,
) -> Engine:
    """A routed engine with one of vLLM's own speculators."""
    made, method = tiny("llama"), request.param
    if method in ("ngram", "suffix") and RUNNER != "v1":
        pytest.skip("Model Runner V2 has no suffix decoding, and its n-gram kernel does not run in the interpreter")
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": 3}
    if method == "ngram":
        config |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    elif method == "suffix":
        pytest.importorskip("arctic_inference.suffix_decoding")
    elif method == "draft_model":
        config["model"] = str(made.folder)
    else:
        config["model"] = str(save_head(tmp_path_factory.mktemp("head") / method, made.model, method))
    return start_engine(made, speculative_config=config)


@pytest.mark.parametrize(
    "speculating",
    ["draft_model", EAGLE, EAGLE3, *(pytest.param(method, marks=pytest.mark.slow) for method in ("ngram", "suffix"))],
    indirect=True,
)
def test_vllms_own_speculators(speculating: Engine) -> None:
    """Fails if routing breaks what vLLM's speculators read of the runner, or they break what the routes know."""
    engine, method = speculating, speculating.runner.speculative_config.method
    for policy in (MASKED, KV_ONLY):
        engine.configure(policy, 1)
        asks = batch(seed=1)
        outputs = engine.run(asks)
        engine.check(asks, outputs)
        outcomes = [output.kv_transfer_params["buddy"] for output in outputs]
        drafted, accepted = (sum(outcome[key] for outcome in outcomes) for key in ("drafted", "accepted"))
        assert drafted > accepted
        assert accepted or method == EAGLE3  # a random head, see tiny_heads.py
        again = engine.run(asks)
        engine.check(asks, again)
        assert any(output.num_cached_tokens for output in again)


@pytest.mark.skipif(RUNNER != "v1", reason="the other runner hands states to its drafter elsewhere")
@pytest.mark.parametrize("speculating", [EAGLE3], indirect=True)
def test_the_states_that_eagle3_drafts_from(speculating: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a drafter sees other states between layers than those that the next layer gets."""
    engine, seen = speculating, []
    propose = engine.runner.drafter.propose

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["target_hidden_states"].clone())
        return propose(*args, **kwargs)

    monkeypatch.setattr(engine.runner.drafter, "propose", watch)
    prompt = batch(seed=2)[0].prompt
    for budget in (1.0, 0.5):
        seen.clear()
        ask = Ask(prompt, budget, 1)
        engine.run([ask])
        states = _reference_states(engine, ask)
        torch.testing.assert_close(seen[0], torch.cat(states, dim=-1), rtol=1e-4, atol=1e-4)


def _reference_states(engine: Engine, ask: Ask) -> list[torch.Tensor]:
    """The states before AUXILIARY_LAYERS, each [num_tokens, hidden_size], of a prompt in the reference."""
    model = engine.tiny.model
    backbone: Any = model.model
    norms = [*(backbone.layers[index].input_layernorm for index in AUXILIARY_LAYERS[:-1]), backbone.norm]
    states: list[torch.Tensor] = []
    paths = engine.expected(ask).paths
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].clone())) for norm in norms]
    routed_logits(model, ask.prompt, paths, engine.policy, engine.tiny.artifact.bypass)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("policy", [MASKED, KV_ONLY])
def test_a_request_preempted_after_drafts_takes_no_block_beyond_its_change_of_path(
    llama_drafted: Engine, policy: str
) -> None:
    """Fails if accepted drafts end a block after a change of path, and the block is looked up when it is preempted.

    Paths of drafts are decided on a copy, so the request itself has not decided its change by then.
    """
    engine = llama_drafted
    engine.configure(policy, 1)
    leaver, sharer = leaves_among_drafts(engine)
    draft_answers(engine, [leaver], accuracy=1.0)
    OracleDrafter.rng = Mock(integers=lambda _: NUM_DRAFTS, random=np.zeros)
    engine.run([sharer])
    engine.add(leaver, "leaver")
    while not engine.scheduler.running or engine.scheduler.running[0].num_tokens <= BLOCK_SIZE:
        engine.step()
    (request,) = engine.scheduler.running
    assert len(request.block_hashes) == 1  # what vLLM looks up, also when it resumes a request
    assert engine.preempt(0)
    assert not request.block_hashes
    engine.check([leaver], [engine.finish()["leaver"]])
    (again,) = engine.run([sharer])  # the block was there
    assert again.num_cached_tokens == BLOCK_SIZE


def leaves_among_drafts(engine: Engine) -> tuple[Ask, Ask]:
    """A request that leaves its path among its first drafts, and one whose prompt holds the block that they end."""
    num_prompt = BLOCK_SIZE - 2
    for prompt in random_prompts(200, seed=11, min_tokens=num_prompt, max_tokens=num_prompt):
        leaver = Ask(tuple(prompt), 0.4, 12)
        answer = engine.expected(leaver)
        sharer = Ask((*prompt, *answer.token_ids)[: BLOCK_SIZE + 1], 0.4, 1)
        first = answer.paths[0]
        if answer.paths[num_prompt + 1] != first == answer.paths[num_prompt] == engine.expected(sharer).paths[0]:
            return leaver, sharer
    raise AssertionError("no such pair among 200 prompts")
