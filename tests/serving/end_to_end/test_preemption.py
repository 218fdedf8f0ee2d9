"""Preemption and resume: a request computed again gives the tokens of an undisturbed one."""

import pytest

from tests.harness.batches import batch_to_preempt
from tests.harness.engine import Ask, Engine
from vllm_buddy.method.kv_policy import KV_POLICIES


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("interval", [1, 4, 16])
def test_preempted_requests_run_their_old_paths_again(engine: Engine, policy: str, interval: int) -> None:
    """Fails if a resumed request runs its generated tokens on other paths, or on top of its old layer lengths."""
    engine.configure(policy, interval)
    asks = batch_to_preempt()

    def disturb(step: int) -> None:
        if step in (2, 9, 17):
            engine.preempt(step)

    outputs = engine.run(asks, before_step=disturb)
    engine.check(asks, outputs)
    # Tokens computed again are counted again: that is how we know that something was.
    assert sum(o.kv_transfer_params["buddy"]["tokens"] for o in outputs) > sum(len(a.prompt) + 23 for a in asks)


@pytest.mark.parametrize("chunk", [7, 33])
@pytest.mark.parametrize("policy", KV_POLICIES)
def test_preemption_of_all_without_a_cache(llama: Engine, policy: str, chunk: int) -> None:
    """Fails if a request that restarts at its first token, chunk by chunk, depends on what it was before."""
    llama.configure(policy, 1, chunk=chunk)
    asks = batch_to_preempt()

    def disturb(step: int) -> None:
        if step in (5, 30):
            llama.preempt_all()

    llama.check(asks, llama.run(asks, before_step=disturb))


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_preemption_by_vllm_when_blocks_run_out(crowded: Engine, policy: str) -> None:
    """Fails if routing breaks where vLLM preempts within schedule(), takes blocks away and gives others."""
    crowded.configure(policy, 1)
    asks = [Ask(ask.prompt, ask.budget, 80) for ask in batch_to_preempt(seed=22)]
    preempted: list[int] = []

    def watch(step: int) -> None:
        preempted.append(sum(request.num_preemptions for request in crowded.scheduler.requests.values()))

    crowded.check(asks, crowded.run(asks, before_step=watch))
    assert max(preempted) > 0
