"""Quantised models and KV caches: a routed path computes what stock vLLM computes on a checkpoint of its layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.quantised import FORMATS, quantise
from tests.harness.engine import Ask, Tiny, start_engine
from tests.harness.tiny_models import NUM_LAYERS, load_model, random_prompts
from vllm_buddy.baselines import PruneSettings, prune, save_pruned
from vllm_buddy.method import budget_for_depth, depth_for_budget
from vllm_buddy.method.kv_policy import KV_ONLY, ZERO

NUM_LAYERS_KEPT = 5
NUM_TOKENS = 16
CACHES = ("fp8_e4m3", "fp8_e5m2")  # and weights as they are
KINDS = [kind if kind == "GPTQ" else pytest.param(kind, marks=pytest.mark.slow) for kind in (*FORMATS, *CACHES)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_equals_the_quantised_pruned_model(tiny: Callable[[str], Tiny], tmp_path: Path, kind: str) -> None:
    """Fails if skipped layers or rows disturb quantised products, or the artifact is refused for such a model."""
    whole = tiny("qwen2")
    settings = PruneSettings(method="random", seed=1, out=tmp_path, layers=NUM_LAYERS_KEPT)
    pruned = prune(settings, whole.folder)
    save_pruned(pruned, whole.folder, tmp_path)
    budget = budget_for_depth(NUM_LAYERS_KEPT, NUM_LAYERS)
    full, cut = whole.folder, tmp_path / "checkpoint"
    options: dict[str, Any] = {"dtype": "bfloat16"}
    if kind in CACHES:
        options["kv_cache_dtype"] = kind
    else:
        full, cut = quantise(full, tmp_path / "full", kind), quantise(cut, tmp_path / "cut", kind)
    model = load_model(whole.folder)
    routed = start_engine(
        Tiny(full, tmp_path / "artifact", model, pruned.artifact),
        buddy={"kv_policy": "masked", "paths": None},
        **options,
    )
    prompts = [tuple(prompt) for prompt in random_prompts(4, seed=3, max_tokens=200)]
    for folder, asked in ((full, 1.0), (cut, budget)):
        stock = start_engine(Tiny(folder, tmp_path, model, pruned.artifact), model_impl="auto", **options)
        sampling = {"logprobs": 0}
        expected = stock.run([Ask(prompt, None, NUM_TOKENS, sampling) for prompt in prompts])
        outputs = routed.run([Ask(prompt, asked, NUM_TOKENS, sampling) for prompt in prompts])
        for ours, theirs in zip(outputs, expected, strict=True):
            assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
            assert ours.outputs[0].cumulative_logprob == theirs.outputs[0].cumulative_logprob
            assert ours.kv_transfer_params["buddy"]["depth"] == depth_for_budget(asked, NUM_LAYERS)
    # Beside requests of another depth, layers run a part of the rows. The likeliest first token is as likely as alone,
    # but for the rounding of other batch sizes.
    mixed = [Ask(prompts[0], b, 1, {"logprobs": 0}) for b in (budget, 1.0, 0.75)]
    alone = [routed.run([ask])[0] for ask in mixed]
    assert len({round(output.outputs[0].cumulative_logprob, 2) for output in alone}) == len(mixed)
    for together, one in zip(routed.run(mixed), alone, strict=True):
        assert together.kv_transfer_params["buddy"]["depth"] == one.kv_transfer_params["buddy"]["depth"]
        assert together.outputs[0].cumulative_logprob == pytest.approx(one.outputs[0].cumulative_logprob, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [KV_ONLY, ZERO])
def test_what_a_skipped_layer_writes_into_a_quantised_cache(tiny: Callable[[str], Tiny], policy: str) -> None:
    """Fails if K and V of skipped rows are written in another format than those of rows that run the layer."""
    engine = start_engine(tiny("llama"), kv_cache_dtype="fp8_e4m3")
    engine.configure(policy, 4)
    asks = [Ask(tuple(prompt), 0.5, 4, {"logprobs": 0}) for prompt in random_prompts(4, seed=5, max_tokens=200)]
    for ask, output in zip(asks, engine.run(asks), strict=True):
        first = next(iter(output.outputs[0].logprobs[0].values()))
        expected = engine.expected(ask)
        assert output.outputs[0].token_ids[0] == expected.token_ids[0]
        assert first.logprob == pytest.approx(expected.logprobs[0], abs=0.3)
