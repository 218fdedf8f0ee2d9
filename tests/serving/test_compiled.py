"""Layers compiled one by one: the same tokens, and nothing compiled again."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.serving.engine import Engine, Tiny, start_engine
from tests.serving.test_golden import batch


@pytest.fixture(scope="module")
def compiled(tiny: Callable[[str], Tiny]) -> Iterator[Engine]:
    """A routed engine with vLLM's default compilation mode."""
    yield start_engine(tiny("llama"), enforce_eager=False)


@pytest.mark.parametrize("policy", ("masked", "kv_only"))
def test_compiled_layers_give_the_reference_tokens(compiled: Engine, policy: str) -> None:
    """Fails if a compiled layer runs another layer's weights, keeps a length it was traced with, or mixes up rows."""
    compiled.configure(policy, 4)
    asks = batch(seed=7)
    compiled.check(asks, compiled.run(asks))
    compiled.check(asks[:1], compiled.run(asks[:1]))  # one row, the size compilers like to specialise on


def test_paths_and_batch_sizes_compile_nothing_new(compiled: Engine) -> None:
    """Fails if a path, a batch size or a prompt length makes a graph of its own."""
    from vllm_buddy.serving.layer_compile import DirectCall

    functions = compiled.runner.model.model._functions
    assert len(functions) == compiled.runner.buddy_policy.num_layers
    assert all(isinstance(function, DirectCall) for function in functions)
    compiled.configure("masked", 1)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for num_requests in (1, 3, 8):
        compiled.run(batch(seed=num_requests, max_prompt=30 * num_requests)[:num_requests])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
