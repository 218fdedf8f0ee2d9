"""Prefix caching of routed requests: hits happen, and change no token."""

import pytest

from tests.harness.engine import BLOCK_SIZE, Ask, Engine
from tests.harness.tiny_models import random_prompts
from vllm_buddy.method import LayerPath, RequestRoute, depth_for_budget
from vllm_buddy.method.kv_policy import KV_POLICIES

ROUTED_BUDGETS = (0.5, 0.75, 0.4, 0.625)


def prompt_path(engine: Engine, prompt: tuple[int, ...], budget: float) -> LayerPath:
    depth = depth_for_budget(budget, engine.scheduler._routes.router.num_layers)
    return RequestRoute(engine.scheduler._routes.router, engine.schedule, depth, prompt).first_path


def random_tokens(num: int, seed: int) -> tuple[int, ...]:
    return tuple(random_prompts(1, seed=seed, min_tokens=num, max_tokens=num)[0])


def same_path_prompts(engine: Engine, prefix: tuple[int, ...], budget: float, num: int) -> list[tuple[int, ...]]:
    """Prompts that begin with `prefix`, end differently and have one path."""
    prompts = [prefix + random_tokens(5, seed) for seed in range(200)]
    paths = [prompt_path(engine, prompt, budget) for prompt in prompts]
    commonest = max(set(paths), key=paths.count)
    same = [prompt for prompt, path in zip(prompts, paths) if path == commonest]
    assert len(same) >= num
    return same[:num]


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("interval", [0, 1, 4, 16])
def test_a_repeated_batch_is_found_in_the_cache_and_gives_the_same_tokens(
    engine: Engine, policy: str, interval: int
) -> None:
    """Fails if routed requests find no blocks, or find blocks of another path."""
    engine.configure(policy, interval)
    prompts = random_prompts(8, seed=11, min_tokens=20, max_tokens=140)
    budgets = (*ROUTED_BUDGETS, 1.0, *ROUTED_BUDGETS[:3])
    asks = [Ask(tuple(p), b, 20) for p, b in zip(prompts, budgets)]
    first, second = engine.run(asks), engine.run(asks)
    engine.check(asks, first)
    engine.check(asks, second)
    assert [output.num_cached_tokens for output in first] == [0] * len(asks)
    for ask, output in zip(asks, second):
        # vLLM computes the last token again, to have its logits.
        assert output.num_cached_tokens == (len(ask.prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert sum(output.num_cached_tokens > 0 for output in second) >= 6


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_one_prompt_at_many_budgets_shares_nothing_between_paths(llama: Engine, policy: str) -> None:
    """Fails if blocks of one depth are found by a request of another: their KV differs."""
    llama.configure(policy, 4)
    prompt = random_tokens(100, seed=5)
    # None is the server's default, 1.0: full depth, as the first one.
    for budget, cached in ((1.0, 0), (0.5, 0), (0.75, 0), (0.4, 0), (None, 96), (0.5, 96)):
        ask = Ask(prompt, budget, 20)
        (output,) = llama.run([ask])
        llama.check([ask], [output])
        assert output.num_cached_tokens == cached


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("interval", [1, 4])
def test_requests_that_share_blocks_may_leave_their_path_at_the_same_time(
    llama: Engine, policy: str, interval: int
) -> None:
    """Fails if a layer outside the shared path starts at the beginning of the block table: sharers overwrite it.

    That is what `first_block` of the masked policy prevents.
    """
    llama.configure(policy, interval)
    budget = 0.5
    prompts = same_path_prompts(llama, random_tokens(2 * BLOCK_SIZE, seed=1), budget, 12)
    asks = [Ask(prompt, budget, 24) for prompt in prompts]
    asks = [ask for ask in asks if len(set(llama.expected(ask).paths[: 2 * BLOCK_SIZE + 5 + 20])) > 1]
    assert len(asks) >= 4, "requests must leave the path while all are running"
    llama.check(asks[:1], llama.run(asks[:1]))
    outputs = llama.run(asks)
    assert [output.num_cached_tokens for output in outputs] == [2 * BLOCK_SIZE] * len(asks)
    llama.check(asks, outputs)


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_a_resumed_request_takes_no_block_beyond_its_change_of_path(llama: Engine, policy: str) -> None:
    """Fails if a preempted request finds blocks of its own generated tokens in another request's prompt.

    The other ran them on the prompt's path, this one had left it. That is what `end_hash_chain` prevents.
    """
    llama.configure(policy, 1)
    leaver, sharer = leaver_and_sharer(llama)
    llama.add(leaver, "leaver")
    while len(llama.scheduler.running) == 0 or llama.scheduler.running[0].num_computed_tokens < len(sharer.prompt):
        llama.step()
    llama.check([sharer], llama.run([sharer]))
    assert llama.preempt(0)
    outputs = llama.finish()
    llama.check([leaver], [outputs["leaver"]])
    # The trap was laid: those blocks are in the cache under the hashes that the request had before.
    (again,) = llama.run([sharer])
    assert again.num_cached_tokens == 2 * BLOCK_SIZE


def leaver_and_sharer(engine: Engine) -> tuple[Ask, Ask]:
    """A request that leaves its path within the first block, and one whose prompt is the beginning of its text."""
    budget = 0.4  # few layers, so few paths, so two prompts often have the same one
    for seed in range(100):
        leaver = Ask(random_tokens(20, seed), budget, 80)
        expected = engine.expected(leaver)
        sharer = Ask((*leaver.prompt, *expected.token_ids)[: 2 * BLOCK_SIZE + 1], budget, 1)
        path = expected.paths[0]
        left = any(p != path for p in expected.paths[:BLOCK_SIZE])
        if left and prompt_path(engine, sharer.prompt, budget) == path:
            return leaver, sharer
    raise AssertionError("no such pair among 100 prompts")


def test_a_users_salt_still_separates_routed_requests(llama: Engine) -> None:
    """Fails if the path replaces the user's cache_salt: users would see from timing what others asked."""
    llama.configure("masked", 4)
    ask = Ask(random_tokens(70, seed=3), 0.5, 4)
    for name, salt in (("a1", "alice"), ("b", "bob"), ("a2", "alice"), ("none", None)):
        llama.add(ask, name, cache_salt=salt)
        llama.step()
    cached = {name: output.num_cached_tokens for name, output in llama.finish().items()}
    assert cached == {"a1": 0, "b": 0, "a2": 64, "none": 0}


def test_no_salt_of_a_user_reaches_the_blocks_of_a_path(llama: Engine) -> None:
    """Fails if a request at full depth can find, or publish, blocks of a path by sending that path's salt."""
    llama.configure("masked", 4)
    prompt = random_tokens(70, seed=4)
    llama.add(Ask(prompt, 0.5, 4), "routed")
    llama.step()
    salt = llama.scheduler.running[0].cache_salt
    full = Ask(prompt, 1.0, 8)
    forgeries = {str(salt), *(part for part in salt if isinstance(part, str))}
    for number, forgery in enumerate(forgeries):
        llama.add(full, f"forged-{number}", cache_salt=forgery)
    outputs = llama.finish()
    for number in range(len(forgeries)):
        assert outputs[f"forged-{number}"].num_cached_tokens == 0
        llama.check([full], [outputs[f"forged-{number}"]])
