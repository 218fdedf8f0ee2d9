"""Tokens of the engine equal the reference's, under every KV policy and schedule."""

import pytest

from tests.harness.batches import NUM_TOKENS, batch
from tests.harness.engine import MAX_TOKENS_PER_STEP, Ask, Engine
from tests.harness.tiny_models import random_prompts
from vllm_buddy.method import path_of
from vllm_buddy.method.kv_policy import KV_POLICIES


@pytest.mark.parametrize("bypass", [False, True], ids=("bare", "bypass"))
@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("interval", [0, 1, 4, 16])
def test_tokens_of_a_mixed_batch_equal_the_reference(engine: Engine, policy: str, interval: int, bypass: bool) -> None:
    """Fails if a layer runs wrong rows, attends to wrong positions or leaves the wrong thing where it is skipped."""
    engine.configure(policy, interval, bypass=bypass)
    asks = batch(seed=interval)
    engine.check(asks, engine.run(asks))


@pytest.mark.parametrize("chunk", [7, 33])
@pytest.mark.parametrize("policy", KV_POLICIES)
def test_tokens_do_not_depend_on_chunked_prefill(engine: Engine, policy: str, chunk: int) -> None:
    """Fails if a path or a layer's length depends on where a chunk of the prompt ends."""
    engine.configure(policy, 4, chunk=chunk)
    asks = batch(seed=4)
    engine.check(asks, engine.run(asks))


def test_seeds_beside_chunked_prefill(engine: Engine) -> None:
    """Fails if a seed beside a prompt in chunks ends the engine, as in stock vLLM on CPU, or chunks use up the seed."""
    prompts = random_prompts(4, seed=7, min_tokens=40, max_tokens=100)
    sampling = [{"temperature": 1.0, "seed": seed} for seed in range(4)]
    asks = [Ask(tuple(p), b, NUM_TOKENS, s) for p, b, s in zip(prompts, (1.0, 0.5, 0.75, 0.5), sampling, strict=True)]
    drawn = []
    for chunk in (MAX_TOKENS_PER_STEP, 16):
        engine.configure("masked", 0, chunk=chunk)
        drawn.append([list(output.outputs[0].token_ids) for output in engine.run(asks)])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_tokens_under_a_decision_lag_equal_the_reference(llama: Engine, policy: str) -> None:
    """Fails if a lag other than zero, as asynchronous scheduling needs, is lost between settings and plan."""
    asks = batch(seed=1)
    llama.configure(policy, 1)
    with_less = [llama.expected(ask).paths for ask in asks]
    llama.configure(policy, 1, lag=2)
    assert [llama.expected(ask).paths for ask in asks] != with_less
    llama.check(asks, llama.run(asks))


def test_tokens_with_the_path_library_equal_the_reference(engine: Engine) -> None:
    """Fails if `paths: library` routes outside the library, or otherwise than the reference."""
    engine.configure("masked", 1, library=True)
    asks = batch(seed=2)
    library = {path_of(layers) for sets in engine.tiny.artifact.config.library.values() for layers in sets}
    for ask in asks:
        assert set(engine.expected(ask).paths) <= library | {engine.scheduler._routes.router.full}
    engine.check(asks, engine.run(asks))


def test_what_the_golden_tests_compare_can_differ(engine: Engine) -> None:
    """Fails if the tiny models no longer tell policies and schedules apart, so that the others prove nothing."""
    asks = [ask for ask in batch(seed=1) if ask.budget != 1.0]
    results = {}
    for policy in KV_POLICIES:
        for interval in (0, 1):
            engine.configure(policy, interval)
            results[policy, interval] = [engine.expected(ask).token_ids for ask in asks]
    # On one path a skipped layer's entries are never read, so the policies agree at R = 0, and only there.
    assert results["masked", 0] == results["kv_only", 0] == results["zero", 0]
    routed_again = [results[policy, 1] for policy in KV_POLICIES]
    assert all(one != other for one in routed_again for other in routed_again if one is not other)
    assert results["masked", 0] not in routed_again
    engine.configure("masked", 1)
    assert all(len(set(engine.expected(ask).paths)) > 1 for ask in asks)
    assert results["masked", 1] == [engine.expected(ask).token_ids for ask in asks]
    engine.configure("masked", 1, bypass=False)
    assert all(one != engine.expected(ask).token_ids for ask, one in zip(asks, results["masked", 1]))
