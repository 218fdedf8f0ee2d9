"""`buddy_context_tokens`: the first path sees the beginning of the prompt only, the rest runs as decoded tokens do."""

import pytest
import torch

from tests.harness.batches import BUDGETS, NUM_TOKENS
from tests.harness.engine import BLOCK_SIZE, Ask, Engine
from tests.harness.tiny_models import random_prompts
from vllm_buddy.method import RequestRoute, depth_for_budget
from vllm_buddy.method.kv_policy import KV_POLICIES
from vllm_buddy.method.reference import routed_logits

# fp32 logits of magnitude 10 from sums in another order
LOGPROB_TOLERANCE = 1e-3


def batch(seed: int) -> list[Ask]:
    """Eight requests whose contexts end anywhere in their prompts, also after the first token and at the end."""
    prompts = random_prompts(len(BUDGETS), seed=seed, min_tokens=20, max_tokens=100)
    contexts = (1, None, 2, 19, 10, len(prompts[5]), 20, 5)
    return [Ask(tuple(p), b, NUM_TOKENS, context=c) for p, b, c in zip(prompts, BUDGETS, contexts)]


@pytest.mark.parametrize("chunk", [7, 8192])
@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("interval", [0, 1, 4])
def test_tokens_equal_the_reference(llama: Engine, policy: str, interval: int, chunk: int) -> None:
    """Fails if the first path sees more than the context, or the rest of the prompt runs on that path."""
    llama.configure(policy, interval, chunk=chunk)
    asks = batch(seed=interval)
    llama.check(asks, llama.run(asks))
    if interval == 1:
        within = [len(set(llama.expected(ask).paths[: len(ask.prompt)])) for ask in asks]
        assert sum(n > 1 for n in within) >= 4, "paths must change within the prompt"


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_prompt_logprobs_equal_the_reference(engine: Engine, policy: str) -> None:
    """Fails if scored prompt tokens run other paths than decoded ones would, or the answer is in other rows' order."""
    engine.configure(policy, 4, chunk=33)
    asks = [Ask(a.prompt, a.budget, 1, {"prompt_logprobs": 0}, a.context) for a in batch(seed=71)]
    artifact = engine.tiny.artifact
    for ask, output in zip(asks, engine.run(asks), strict=True):
        depth = depth_for_budget(ask.budget or 1.0, artifact.config.base_model.num_layers)
        route = RequestRoute(artifact.router(library=False), engine.schedule, depth, ask.prompt, ask.context)
        paths = [run.path for run in route.runs(0, len(ask.prompt), ask.prompt) for _ in range(run.num_tokens)]
        logits = routed_logits(engine.tiny.model, ask.prompt, paths, policy, artifact.bypass)
        expected = logits.log_softmax(dim=-1)[torch.arange(len(paths) - 1), list(ask.prompt[1:])]
        found = [position[token].logprob for position, token in zip(output.prompt_logprobs[1:], ask.prompt[1:])]
        torch.testing.assert_close(torch.tensor(found), expected, atol=LOGPROB_TOLERANCE, rtol=0)


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_no_block_is_found_beyond_a_change_of_path_in_the_prompt(llama: Engine, policy: str) -> None:
    """Fails if a request finds blocks of its first path in a part of its prompt that runs another one.

    The same prompt on one path was served before, and left all of its blocks in the cache.
    """
    llama.configure(policy, 1)
    whole, part, uniform = same_first_path(llama)
    first, again, other, then = (llama.run([ask])[0] for ask in (whole, whole, part, whole))
    for ask, output in ((whole, first), (whole, again), (part, other), (whole, then)):
        llama.check([ask], [output])
    assert again.num_cached_tokens == then.num_cached_tokens == (len(whole.prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert other.num_cached_tokens == uniform // BLOCK_SIZE * BLOCK_SIZE < again.num_cached_tokens


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_blocks_beyond_a_change_of_path_in_the_prompt_are_not_published(llama: Engine, policy: str) -> None:
    """Fails if a request publishes a part of its prompt that ran another path than the first."""
    llama.configure(policy, 1)
    whole, part, uniform = same_first_path(llama)
    other, first = (llama.run([ask])[0] for ask in (part, whole))
    llama.check([part, whole], [other, first])
    assert (other.num_cached_tokens, first.num_cached_tokens) == (0, uniform // BLOCK_SIZE * BLOCK_SIZE)


def same_first_path(engine: Engine) -> tuple[Ask, Ask, int]:
    """A prompt with and without a shorter context, on the same first path, and where the latter leaves it: beyond the
    first block and within the prompt."""
    router = engine.scheduler._routes.router
    for seed in range(300):
        prompt = tuple(random_prompts(1, seed=seed, min_tokens=110, max_tokens=110)[0])
        depth = depth_for_budget(0.4, router.num_layers)
        whole = RequestRoute(router, engine.schedule, depth, prompt)
        for context in range(BLOCK_SIZE, 90):
            part = RequestRoute(router, engine.schedule, depth, prompt, context)
            part.decide(len(prompt), prompt)
            uniform = part.uniform_length or len(prompt)
            if part.first_path == whole.first_path and BLOCK_SIZE < uniform < 3 * BLOCK_SIZE:
                return Ask(prompt, 0.4, 8), Ask(prompt, 0.4, 8, context=context), uniform
    raise AssertionError("no such prompt among 300")
