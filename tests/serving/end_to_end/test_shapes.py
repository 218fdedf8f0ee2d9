"""Models of other shapes than the tiny ones of the other tests: positions, heads, embeddings and vocabularies."""

from pathlib import Path
from typing import Any

import pytest

from tests.harness.engine import Ask, make_tiny, start_engine
from tests.harness.tiny_models import random_prompts
from vllm_buddy.method.kv_policy import KV_POLICIES

# Each changes what the routed model shares with vLLM's: rotary embeddings, heads, or the ends of the model.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3 RoPE scaling, tied embeddings, padded vocabulary": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "tie_word_embeddings": True,
            "vocab_size": 500,
        },
    ),
    "YaRN, wide heads": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            "head_dim": 64,
        },
    ),
    "one KV head, narrow heads, wide MLP": (
        "llama",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 520},
    ),
}
BUDGETS = (1.0, 0.5, 0.75, None)


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_of_this_shape_gives_the_references_tokens(name: str, tmp_path: Path) -> None:
    """Fails if something of the shape is assumed: that heads fill the hidden size, or ids the padded vocabulary."""
    family, config = SHAPES[name]
    tiny = make_tiny(tmp_path, family, config)
    engine = start_engine(tiny)
    vocab_size = int(config.get("vocab_size", 512))
    prompts = [
        tuple(i % vocab_size for i in prompt) for prompt in random_prompts(4, seed=17, min_tokens=70, max_tokens=120)
    ]
    prompts[0] = (*prompts[0], vocab_size - 1)
    for policy in KV_POLICIES:
        engine.configure(policy, 4, chunk=50)
        asks = [Ask(prompt, budget, 8) for prompt, budget in zip(prompts, BUDGETS)]
        asks.append(Ask(prompts[1], 0.75, 8))
        engine.check(asks, engine.run(asks))
        (auto,) = engine.run([Ask(prompts[2], None, 4, options={"buddy_budget": "auto"})])
        outcome = auto.kv_transfer_params["buddy"]
        assert outcome["layers_executed_min"] == outcome["layers_executed_max"] == outcome["depth"]
    engine.abort_all()
