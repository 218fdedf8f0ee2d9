"""Budget 1.0 is the stock model: tokens and, in fp32, logprobs to the last bit."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.harness.engine import Ask, Engine, Tiny, start_engine
from tests.harness.tiny_models import FAMILIES, random_prompts
from vllm_buddy.method.kv_policy import KV_POLICIES

NUM_TOKENS = 16
SAMPLING = {"logprobs": 5, "prompt_logprobs": 3}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With several threads vLLM's CPU kernels divide their sums by the batch, so that stock is not equal to itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tiny: Callable[[str], Tiny], engine_of: Callable[[str], Engine]
) -> tuple[Engine, Engine]:
    """The routed engine of a family, and stock vLLM at the same settings."""
    return engine_of(request.param), start_engine(tiny(request.param), model_impl="auto")


def logprobs(output: Any) -> list[dict[int, float] | None]:
    """Token -> logprob of the most probable tokens, per position, prompt first."""
    positions = [*output.prompt_logprobs, *output.outputs[0].logprobs]
    return [position and {token: entry.logprob for token, entry in position.items()} for position in positions]


def stock_outputs(stock: Engine, prompts: list[list[int]], sampling: dict[str, Any]) -> list[Any]:
    stock.empty_prefix_cache()
    return stock.run([Ask(tuple(p), None, NUM_TOKENS, sampling) for p in prompts])


def check_equal(outputs: list[Any], stock: list[Any]) -> None:
    for output, expected in zip(outputs, stock, strict=True):
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert logprobs(output) == logprobs(expected)


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_full_depth_is_stock_alone_in_a_batch_and_beside_routed_requests(
    pair: tuple[Engine, Engine], policy: str
) -> None:
    """Fails if a request that asks for the whole model gets anything else, be it in the last bit of a logprob."""
    routed, stock = pair
    routed.configure(policy, 1)
    prompts = random_prompts(6, seed=51, min_tokens=2, max_tokens=300)
    expected = stock_outputs(stock, prompts, SAMPLING)
    full = [Ask(tuple(p), 1.0, NUM_TOKENS, SAMPLING) for p in prompts]
    check_equal([routed.run([ask])[0] for ask in full], expected)
    check_equal(routed.run(full), expected)
    mixed = [Ask(a.prompt, 1.0 if i % 2 else 0.5, NUM_TOKENS, SAMPLING) for i, a in enumerate(full)]
    outputs = routed.run(mixed)
    check_equal(outputs[1::2], expected[1::2])
    assert all(logprobs(o) != logprobs(e) for o, e in zip(outputs[::2], expected[::2]))


def test_full_depth_is_stock_after_cache_hits_and_preemption(pair: tuple[Engine, Engine]) -> None:
    """Fails if full-depth requests share blocks with routed ones, or resume otherwise than in stock vLLM."""
    routed, stock = pair
    routed.configure("masked", 1, chunk=33)
    prompts = random_prompts(4, seed=52, min_tokens=70, max_tokens=100)
    # Prompt logprobs would have vLLM pass over the prefix cache.
    expected = stock_outputs(stock, prompts, {"logprobs": 5})
    routed.run([Ask(tuple(p), 0.5, 4) for p in prompts])
    routed.run([Ask(tuple(p), 1.0, 4) for p in prompts])
    full = [Ask(tuple(p), 1.0, NUM_TOKENS, {"logprobs": 5}) for p in prompts]
    outputs = routed.run(full, before_step=lambda step: step == 6 and routed.preempt_all())
    assert all(output.num_cached_tokens >= 64 for output in outputs)
    for output, stock_output in zip(outputs, expected):
        assert output.outputs[0].token_ids == stock_output.outputs[0].token_ids
        assert output.outputs[0].logprobs == stock_output.outputs[0].logprobs


def test_no_budget_is_the_servers_default(pair: tuple[Engine, Engine]) -> None:
    """Fails if a request that knows nothing of budgets is routed by a server whose default is the whole model."""
    routed, stock = pair
    routed.configure("masked", 1)
    prompts = random_prompts(3, seed=53)
    expected = stock_outputs(stock, prompts, SAMPLING)
    check_equal(routed.run([Ask(tuple(p), None, NUM_TOKENS, SAMPLING) for p in prompts]), expected)


def test_routing_takes_no_kv_capacity(tiny: Callable[[str], Tiny]) -> None:
    """Fails if the routed engine has fewer KV blocks than stock at the same settings."""
    settings = {"kv_cache_memory_bytes": 5_000_000}
    routed, stock = (start_engine(tiny("llama"), model_impl=impl, **settings) for impl in ("buddy", "auto"))
    blocks = [e.core.vllm_config.cache_config.num_gpu_blocks for e in (routed, stock)]
    assert blocks[0] == blocks[1] > 1
