"""What `vllm-buddy prune` writes, served: the artifact on the routed engine, the checkpoint on stock vLLM."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.engine import Ask, Tiny, start_engine
from tests.harness.tiny_models import NUM_LAYERS, load_model, random_prompts
from vllm_buddy.baselines import PruneSettings, prune, save_pruned
from vllm_buddy.method import budget_for_depth

NUM_LAYERS_KEPT = 5
NUM_TOKENS = 16


@pytest.mark.slow
def test_both_forms_generate_the_same(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Fails if an engine runs other layers of the artifact than the checkpoint holds, or needs to be told `paths`."""
    settings = PruneSettings(method="random", seed=1, out=tmp_path, layers=NUM_LAYERS_KEPT)
    whole = tiny("qwen2")
    pruned = prune(settings, whole.folder)
    save_pruned(pruned, whole.folder, tmp_path)
    checkpoint = tmp_path / "checkpoint"
    budget = budget_for_depth(NUM_LAYERS_KEPT, NUM_LAYERS)
    routed = start_engine(
        Tiny(whole.folder, tmp_path / "artifact", whole.model, pruned.artifact),
        buddy={"default_budget": budget, "kv_policy": "masked", "paths": None},
    )
    stock = start_engine(
        Tiny(checkpoint, tmp_path / "none", load_model(checkpoint), pruned.artifact), model_impl="auto"
    )
    asks = [Ask(tuple(prompt), None, NUM_TOKENS) for prompt in random_prompts(4, seed=3, max_tokens=200)]
    outputs, expected = routed.run(asks), stock.run(asks)
    assert [output.outputs[0].token_ids for output in outputs] == [o.outputs[0].token_ids for o in expected]
    assert {output.kv_transfer_params["buddy"]["depth"] for output in outputs} == {NUM_LAYERS_KEPT}
    full = routed.run([Ask(ask.prompt, 1.0, NUM_TOKENS) for ask in asks])
    assert all(a.outputs[0].token_ids != b.outputs[0].token_ids for a, b in zip(full, outputs))
