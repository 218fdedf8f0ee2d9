"""Depths per token in the engine: the reference's tokens, and no prefix of a request beyond its budget."""

from collections.abc import Sequence

import pytest

from tests.harness.batches import batch
from tests.harness.engine import Ask, ByToken, Engine
from tests.harness.layer_log import LayerLog
from tests.harness.tiny_models import NUM_LAYERS, TOKEN_DEPTHS, random_prompts
from vllm_buddy.method.kv_policy import KV_ONLY, MASKED

BOTH: ByToken = (True, True)
SCHEDULES = (BOTH, (True, False), (False, True))
ids = {BOTH: "both", (True, False): "prefill", (False, True): "decode"}.get


@pytest.mark.parametrize("by_token", SCHEDULES, ids=ids)
@pytest.mark.parametrize("chunk", [8192, 7, 33])
def test_tokens_equal_the_reference(engine: Engine, by_token: ByToken, chunk: int) -> None:
    """Fails if a row runs another token's path, attends to the wrong positions, or a chunk's end changes a path."""
    engine.configure(KV_ONLY, 4, chunk=chunk, by_token=by_token)
    asks = batch(seed=chunk)
    engine.check(asks, engine.run(asks))


@pytest.mark.parametrize("policy", [KV_ONLY, MASKED])
@pytest.mark.parametrize("bypass", [False, True], ids=("bare", "bypass"))
def test_tokens_equal_the_reference_under_both_kv_policies(llama: Engine, policy: str, bypass: bool) -> None:
    """Fails if a shallow token leaves something else in the cache than its KV policy says."""
    llama.configure(policy, bypass=bypass, by_token=BOTH)
    asks = batch(seed=5)
    llama.check(asks, llama.run(asks))


def test_what_these_tests_compare_can_differ(llama: Engine) -> None:
    """Fails if the tiny models' tokens all have one depth, or no schedule matters, so that the others prove nothing."""
    asks = [ask for ask in batch(seed=5) if ask.budget not in (1.0, 0.4)]
    llama.configure(KV_ONLY, 0)
    same_depth = [llama.expected(ask).token_ids for ask in asks]
    llama.configure(KV_ONLY, 0, by_token=BOTH)
    expected = [llama.expected(ask) for ask in asks]
    assert all(one.token_ids != other for one, other in zip(expected, same_depth) if len(set(one.paths)) > 1)
    depths = {path.bit_count() for one in expected for path in one.paths}
    assert depths == {*TOKEN_DEPTHS, NUM_LAYERS}


def test_no_prefix_of_a_request_runs_more_than_its_budget(engine: Engine) -> None:
    """Fails if the engine runs more layers than the plan, or the count in the response is not what ran."""
    engine.configure(KV_ONLY, chunk=33, by_token=BOTH)
    budgets = (1.0, 0.5, 0.75, 0.625, 0.875, 0.99, 0.6)
    prompts = random_prompts(len(budgets), seed=31, min_tokens=2, max_tokens=60)
    asks = [Ask(tuple(p), b, 12) for p, b in zip(prompts, budgets)]
    request_ids = [engine.add(ask) for ask in asks]
    with LayerLog(engine) as log:
        outputs = engine.finish()
    assert set(log.ran.values()) == {1}
    for request_id, ask in zip(request_ids, asks, strict=True):
        assert ask.budget is not None
        total = 0
        num_tokens = len(ask.prompt) + ask.max_tokens - 1
        for position in range(num_tokens):
            total += sum((request_id, position, layer) in log.ran for layer in range(NUM_LAYERS))
            assert total <= ask.budget * NUM_LAYERS * (position + 1) + 1e-3
        outcome = outputs[request_id].kv_transfer_params["buddy"]
        assert outcome["layers_executed_mean"] == pytest.approx(total / num_tokens)
        # Every position of every layer is filled, by the layer or for it.
        written = [key for key in (log.ran | log.wrote) if key[0] == request_id]
        assert len(written) == num_tokens * NUM_LAYERS


def test_a_preempted_request_runs_the_same_paths_again(engine: Engine) -> None:
    """Fails if a request that is computed again settles its account anew."""
    engine.configure(KV_ONLY, chunk=33, by_token=BOTH)
    asks = batch(seed=9)
    preempted = 0

    def before_step(step: int) -> None:
        nonlocal preempted
        if step in (3, 6, 11):
            preempted += engine.preempt(step)
        if step == 15:
            engine.preempt_all()

    engine.check(asks, engine.run(asks, before_step=before_step))
    assert preempted


def conversation(engine: Engine, first: Ask, budget: float) -> Sequence[int]:
    """Ask, then ask again with the answer in the prompt; returns how many tokens were found in the cache."""
    (output,) = engine.run([first])
    engine.check([first], [output])
    answer = tuple(output.outputs[0].token_ids)
    again = Ask((*first.prompt, *answer, 5, 6, 7), budget, 6)
    (second,) = engine.run([again])
    engine.check([again], [second])
    return [output.num_cached_tokens, second.num_cached_tokens]


def test_requests_of_one_budget_share_blocks_answers_included(llama: Engine) -> None:
    """Fails if KV of another budget is found, or that of an answer, whose paths a longer prompt has as well, is not."""
    llama.configure(KV_ONLY, by_token=BOTH)
    prompt = tuple(random_prompts(1, seed=40, min_tokens=50, max_tokens=50)[0])
    assert conversation(llama, Ask(prompt, 0.75, 60), 0.75) == [0, 96]  # 109 tokens are computed, in blocks of 32
    assert conversation(llama, Ask(prompt, 0.625, 60), 0.875) == [0, 0]
    assert conversation(llama, Ask(prompt, 0.75, 60), 1.0) == [32, 0]


@pytest.mark.parametrize("by_token", [(True, False), (False, True)], ids=ids)
def test_only_the_prompt_is_shared_where_the_answer_is_routed_otherwise(llama: Engine, by_token: ByToken) -> None:
    """Fails if a longer prompt finds blocks of an answer that ran on other paths than the prompt would."""
    llama.configure(KV_ONLY, 0, by_token=by_token)
    prompt = tuple(random_prompts(1, seed=41, min_tokens=50, max_tokens=50)[0])
    first, second = conversation(llama, Ask(prompt, 0.75, 60), 0.75)
    assert first == 0
    assert second <= 32  # of the prompt's 50 tokens; none where the longer prompt has another path
