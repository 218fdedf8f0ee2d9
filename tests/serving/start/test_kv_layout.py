"""KV units at the start of a server: where they cannot be had, and the groups that vLLM makes of them."""

from typing import Any

import pytest
import torch

from tests.harness.engine import Tiny
from tests.harness.server_config import NGRAM, configure, refusal
from tests.harness.tiny_models import (
    NUM_LAYERS,
)


@pytest.mark.parametrize(
    ("buddy", "options", "told"),
    [
        ({"kv_policy": "kv_only"}, {}, '"kv_only" writes every layer of every token'),
        ({"kv_policy": "zero"}, {}, '"zero" writes every layer of every token'),
        ({"schedule": {"decode": "token"}}, {}, '"kv_only" writes every layer of every token'),
        ({"schedule": {"decode": "token"}, "kv_policy": "masked"}, {}, 'schedule "token"'),
        ({}, {"speculative_config": NGRAM}, "start without a speculator"),
        ({}, {"pipeline_parallel_size": 2}, "use tensor or data parallelism"),
        ({}, {"enable_lora": True}, "start without --enable-lora"),
        ({"max_budget": 0.75}, {}, "set max_budget to 1"),
        (
            {"kv_classes": 3},
            {},
            "kv_classes 3 must divide the model's 8 layers and leave two units; choose one of 1, 2, 4",
        ),
        ({"kv_classes": 8}, {}, "choose one of 1, 2, 4"),
        ({}, {"kv_transfer_config": {"kv_connector": "x", "kv_role": "kv_both"}}, "a KV connector"),
        ({"kv_layout": "dense", "kv_classes": 2}, {}, 'with kv_layout "units" only'),
    ],
    ids=str,
)
def test_kv_units_that_cannot_be_had_are_refused_with_the_reason(
    llama_model: Tiny, buddy: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    """Fails if a server starts that promises memory that it does not save, or loses track of a layer."""
    assert told in refusal(llama_model, {"kv_layout": "units", **buddy}, **options)


def test_kv_units_become_groups_of_one_layer_of_each_class(llama_model: Tiny) -> None:
    """Fails if vLLM groups layers otherwise than the plan, or groups those of other servers."""
    config = configure(llama_model, {"kv_layout": "units"})
    units = config.model_config.buddy_kv_units
    groups = kv_cache_groups(config)
    assert len(groups) == units.num_units == 4
    for unit, group in enumerate(groups):
        layers = [int(name.split(".")[2]) for name in group.layer_names]
        assert [units.class_of[layer] for layer in layers] == [0, 1]
        assert [units.home[layer] for layer in layers] == [unit, unit]
    assert configure(llama_model).model_config.buddy_kv_units is None
    assert len(kv_cache_groups(configure(llama_model))) == 1


def test_kv_units_of_a_model_without_some_layers_are_refused(llama_model: Tiny) -> None:
    """Fails if layers that have no KV cache would shift the others into each other's memory."""
    from vllm.v1.core import kv_cache_utils

    specs = kv_cache_specs()
    specs.pop("model.layers.3.self_attn.attn")
    with pytest.raises(ValueError, match="needs a KV cache in each of 8 layers, found 7"):
        kv_cache_utils.get_kv_cache_groups(configure(llama_model, {"kv_layout": "units"}), specs)


def test_a_memory_too_small_for_one_request_at_full_depth_is_refused_with_the_numbers(llama_model: Tiny) -> None:
    """Fails if a server with units starts that would preempt its only request for ever."""
    from vllm.v1.core import kv_cache_utils

    def start_with(num_blocks: int) -> Any:
        config = configure(llama_model, {"kv_layout": "units"}, num_gpu_blocks_override=num_blocks)
        config.cache_config.kv_cache_layout = "NHD"
        return kv_cache_utils.get_kv_cache_configs(config, [kv_cache_specs()], [1 << 30])[0]

    # 512 tokens take 4 blocks in each of 4 units, and vLLM keeps a block.
    with pytest.raises(ValueError, match=r"max seq len \(512\).*estimated maximum model length is 384"):
        start_with(16)
    assert start_with(17).num_blocks == 17


def kv_cache_specs() -> dict[str, Any]:
    """What the layers of a tiny model say of their KV caches, in blocks of 128 tokens."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=32, dtype=torch.float32)
    return {f"model.layers.{layer}.self_attn.attn": spec for layer in range(NUM_LAYERS)}


def kv_cache_groups(config: Any) -> list[Any]:
    from vllm.v1.core import kv_cache_utils

    return kv_cache_utils.get_kv_cache_groups(config, kv_cache_specs())
