"""The embedded models with their shipped artifacts: tokens equal the reference's, and full depth equals stock vLLM."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.harness.engine import Ask, Tiny, start_engine
from vllm_buddy.artifact import SHIPPED_DIR, load_artifact
from vllm_buddy.models import EMBEDDED_MODELS, default_folder, fetch, find_problem, load_model, load_tokenizer

BUDGETS = (1.0, 0.875, 0.75, 0.5)
NUM_TOKENS = 12
TEXT = (
    "The capital of France is",
    "def reverse(words):\n    return",
    "Once upon a time there was a",
    "12 eggs cost 3 dollars, so 30 eggs cost",
    "Die Katze sitzt auf dem",
    "To boil an egg, first",
)


def folder_of(name: str) -> Path:
    """The folder of an embedded model. One that would have to be downloaded is skipped."""
    if name == "smollm2-135m":
        return fetch(name)
    if find_problem(default_folder(name), EMBEDDED_MODELS[name]) is not None:
        pytest.skip(f"needs a download: vllm-buddy fetch-model {name}")
    return default_folder(name)


def asks(prompts: Sequence[list[int]]) -> list[Ask]:
    """Each prompt at each budget."""
    return [Ask(tuple(prompt), budget, NUM_TOKENS, {"logprobs": 0}) for prompt in prompts for budget in BUDGETS]


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_real_weights_equal_the_reference(name: str) -> None:
    """Fails if serving is right for small random weights only, or a shipped artifact does not fit its model."""
    folder, artifact = folder_of(name), load_artifact(SHIPPED_DIR / name)
    tiny = Tiny(folder, SHIPPED_DIR / name, load_model(folder, torch.float32), artifact)
    memory = {"kv_cache_memory_bytes": 256 << 20}
    engine = start_engine(tiny, buddy={"kv_policy": "masked", "paths": None}, **memory)
    engine.configure("masked", artifact.config.route_every or 0, library=artifact.decision is not None)
    tokenizer = load_tokenizer(folder)
    batch = asks([tokenizer(text).input_ids for text in TEXT])
    outputs = engine.run(batch)
    engine.check(batch, outputs)
    stock = start_engine(tiny, model_impl="auto", **memory)
    full = [(ask, output) for ask, output in zip(batch, outputs) if ask.budget == 1.0]
    alone = engine.run([ask for ask, _ in full])
    expected = stock.run([Ask(ask.prompt, None, NUM_TOKENS, ask.sampling) for ask, _ in full])
    for ours, theirs in zip(alone, expected, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        assert ours.outputs[0].cumulative_logprob == theirs.outputs[0].cumulative_logprob
