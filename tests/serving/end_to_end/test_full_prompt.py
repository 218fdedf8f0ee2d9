"""Prompts at full depth: decoded tokens run the budget, and prompts are shared with requests of every budget."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.harness.batches import batch
from tests.harness.engine import BLOCK_SIZE, Ask, ByToken, Engine
from tests.harness.tiny_models import NUM_LAYERS
from vllm_buddy.method import depth_for_budget
from vllm_buddy.method.kv_policy import KV_ONLY, KV_POLICIES, MASKED

FULL = {"buddy_prompt": "full"}


def with_full_prompts(asks: Sequence[Ask], num_tokens: int = 20) -> list[Ask]:
    return [Ask(ask.prompt, ask.budget, num_tokens, options=FULL) for ask in asks]


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("interval", [0, 1, 16])
def test_tokens_equal_the_reference_beside_routed_prompts(engine: Engine, policy: str, interval: int) -> None:
    """Fails if a decoded token does not find the prompt's K and V in every layer, or a prompt runs its budget."""
    engine.configure(policy, interval, chunk=33)
    asks = [*with_full_prompts(batch(seed=2)[:5]), *batch(seed=3)[:5]]
    outputs = engine.run(asks)
    engine.check(asks, outputs)
    for ask, output in zip(asks, outputs):
        outcome = output.kv_transfer_params["buddy"]
        depth = depth_for_budget(ask.budget or 1.0, NUM_LAYERS)
        in_prompt = NUM_LAYERS if ask.options else depth
        assert outcome["prompt"] == {"tokens": len(ask.prompt), "layers_executed_mean": in_prompt}
        assert outcome["decoded"] == {"tokens": ask.max_tokens - 1, "layers_executed_mean": depth}


@pytest.mark.parametrize("by_token", [(True, True), (False, True)], ids=("both", "decode"))
@pytest.mark.parametrize("policy", [KV_ONLY, MASKED])
def test_decoded_tokens_may_have_depths_of_their_own(engine: Engine, policy: str, by_token: ByToken) -> None:
    """Fails if the account of the decoded tokens pays for the prompt."""
    engine.configure(policy, 4, by_token=by_token)
    asks = with_full_prompts(batch(seed=4))
    outputs = engine.run(asks)
    engine.check(asks, outputs)
    for ask, output in zip(asks, outputs):
        decoded = output.kv_transfer_params["buddy"]["decoded"]
        assert decoded["layers_executed_mean"] <= (ask.budget or 1.0) * NUM_LAYERS + 1e-6


@pytest.mark.parametrize("policy", [MASKED, KV_ONLY])
def test_a_prompt_is_cached_once_for_all_budgets(llama: Engine, policy: str) -> None:
    """Fails if full prompts are cached per path, or what a request decoded on its path is found by another."""
    llama.configure(policy, 1)
    prompt = tuple((batch(seed=5)[0].prompt * 8)[: 4 * BLOCK_SIZE + 5])
    first = [Ask(prompt, 1.0, 40)]
    llama.check(first, llama.run(first))
    asks = [Ask(prompt, budget, 40, options=FULL) for budget in (0.5, 0.75, 0.4, 1.0)]
    outputs = llama.run(asks)
    llama.check(asks, outputs)
    assert [output.num_cached_tokens for output in outputs] == [4 * BLOCK_SIZE] * 4
    # A prompt that goes on with what the first of them decoded finds the part that all layers ran, and no more.
    longer = [Ask((*prompt, *outputs[0].outputs[0].token_ids), budget, 8, options=FULL) for budget in (0.75, 0.5, 0.4)]
    outputs = llama.run(longer)
    llama.check(longer, outputs)
    assert outputs[0].num_cached_tokens == 4 * BLOCK_SIZE


@pytest.mark.parametrize("policy", [MASKED, KV_ONLY])
def test_preemption_changes_nothing(llama: Engine, policy: str) -> None:
    """Fails if a request that is computed again runs its decoded tokens, in one chunk with the prompt, otherwise."""
    llama.configure(policy, 4, chunk=33)
    asks = with_full_prompts(batch(seed=6), 32)

    def disturb(step: int) -> None:
        if step % 6 == 4:
            llama.preempt(step)
        if step == 20:
            llama.preempt_all()

    llama.check(asks, llama.run(asks, before_step=disturb))


def refused(engine: Engine, **options: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError) as caught:
        engine.add(Ask((1, 2, 3), 0.5, 2, options=options))
    return caught.value


def test_an_unknown_kind_of_prompt_is_refused(llama: Engine) -> None:
    """Fails if a misspelt kind is served as another one, or two options that contradict each other are accepted."""
    error = refused(llama, buddy_prompt="ful")
    assert error.parameter == "vllm_xargs.buddy_prompt"
    assert '"routed" and "full"' in str(error)
    error = refused(llama, buddy_prompt="full", buddy_context_tokens=2)
    assert error.parameter == "vllm_xargs.buddy_context_tokens"
