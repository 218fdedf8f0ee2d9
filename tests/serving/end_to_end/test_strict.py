"""Strictness: every token runs exactly the layers of its depth, seen by an instrument of the tests' own."""

import pytest

from tests.harness.engine import Ask, Engine
from tests.harness.layer_log import LayerLog
from tests.harness.tiny_models import NUM_LAYERS, random_prompts
from vllm_buddy.method import depth_for_budget, layers_of
from vllm_buddy.method.kv_policy import KV_POLICIES, MASKED

BUDGETS = (1.0, 0.5, 0.75, 0.4, 0.625, 0.5, 0.875, 0.4)


@pytest.mark.parametrize("bypass", [False, True], ids=("bare", "bypass"))
@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("interval", [1, 4])
def test_every_token_runs_exactly_the_layers_of_its_path_once(
    engine: Engine, policy: str, interval: int, bypass: bool
) -> None:
    """Fails if a row runs a layer it should skip, skips one it should run, or the reported count is not what ran.

    Or if the bypass of a layer gets a row that runs the layer, or misses one that skips it.
    """
    engine.configure(policy, interval, chunk=33, bypass=bypass)
    prompts = random_prompts(len(BUDGETS), seed=31, min_tokens=2, max_tokens=60)
    asks = [Ask(tuple(p), b, 10) for p, b in zip(prompts, BUDGETS)]
    ids = [engine.add(ask) for ask in asks]
    with LayerLog(engine) as log:
        outputs = engine.finish()
    for counter in (log.ran, log.bypassed, log.wrote):
        assert set(counter.values()) <= {1}
    for request_id, ask in zip(ids, asks):
        depth = depth_for_budget(ask.budget or 1.0, NUM_LAYERS)
        num_tokens = len(ask.prompt) + ask.max_tokens - 1
        paths = engine.expected(ask).paths
        for position in range(num_tokens):
            ran = [layer for layer in range(NUM_LAYERS) if (request_id, position, layer) in log.ran]
            wrote = [layer for layer in range(NUM_LAYERS) if (request_id, position, layer) in log.wrote]
            assert len(ran) == depth
            assert ran[0] == 0
            assert ran[-1] == NUM_LAYERS - 1
            assert ran == layers_of(paths[position])
            bypassed = [layer for layer in range(NUM_LAYERS) if (request_id, position, layer) in log.bypassed]
            assert sorted(ran + bypassed) == (list(range(NUM_LAYERS)) if bypass else ran)
            assert sorted(ran + wrote) == (ran if policy == MASKED else list(range(NUM_LAYERS)))
        outcome = outputs[request_id].kv_transfer_params["buddy"]
        assert outcome["depth"] == depth
        assert outcome["tokens"] == num_tokens
        assert outcome["layers_executed_mean"] == outcome["layers_executed_min"] == depth
        assert outcome["layers_executed_max"] == depth
    assert len(log.ran) == sum(
        depth_for_budget(a.budget or 1.0, NUM_LAYERS) * (len(a.prompt) + a.max_tokens - 1) for a in asks
    )


def test_the_masked_cache_holds_the_tokens_that_ran_each_layer(llama: Engine) -> None:
    """Fails if a layer's length differs from the number of tokens that ran it: attention would read stale entries."""
    llama.configure(MASKED, 1, chunk=7)
    prompts = random_prompts(4, seed=32, min_tokens=2, max_tokens=60)
    ids = [llama.add(Ask(tuple(p), b, 12)) for p, b in zip(prompts, (0.5, 1.0, 0.4, 0.75))]
    checked = 0
    with LayerLog(llama) as log:
        while llama.scheduler.has_unfinished_requests():
            llama.step()
            for request in llama.scheduler.running:
                name = request.request_id.rsplit("-", 1)[0]
                ran = [sum(1 for r, _, layer in log.ran if (r, layer) == (name, i)) for i in range(NUM_LAYERS)]
                if ran[0]:
                    assert ran == llama.runner.buddy_state.policy.layer_lengths(request.request_id).tolist()
                    assert ran[0] == ran[-1] == request.num_computed_tokens
                    checked += 1
    assert checked > len(ids)
