"""Mistral, whose layers vLLM implements apart from Llama's: tokens equal the reference's."""

from collections.abc import Callable

import pytest

from tests.harness.batches import batch
from tests.harness.engine import Engine, Tiny, start_engine
from vllm_buddy.method.kv_policy import KV_POLICIES


@pytest.fixture(scope="module")
def mistral(tiny: Callable[[str], Tiny]) -> Engine:
    return start_engine(tiny("mistral"))


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_tokens_of_a_mixed_batch_equal_the_reference(mistral: Engine, policy: str) -> None:
    """Fails if the layers of vLLM's Mistral are called in another way than they expect."""
    mistral.configure(policy, 4, chunk=33)
    asks = batch(seed=4)
    mistral.check(asks, mistral.run(asks))
