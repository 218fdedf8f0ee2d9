"""Lossless mode beside options of sampling: what is drawn is what the full model would draw."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.v1.sample import rejection_sampler

from tests.harness.engine import Ask, Engine
from tests.harness.lossless import LOSSLESS, draft_texts, mixed_batch, outcomes
from tests.harness.tiny_models import NUM_LAYERS, VOCAB_SIZE, random_prompts
from vllm_buddy.method import full_path
from vllm_buddy.method.kv_policy import MASKED
from vllm_buddy.method.reference import routed_logits

pytestmark = pytest.mark.usefixtures("always_draft")


def test_options_of_sampling_hold_beside_drafts(
    lossless_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a draft is confirmed that the same request, which had no drafts, would not have sampled.

    Drafts come from layers, which know of no option and are often wrong, and then are the answer itself.
    """
    engine = lossless_of("llama")
    engine.configure(MASKED)
    prompts = [tuple(prompt) for prompt in random_prompts(6, seed=13, min_tokens=9, max_tokens=30)]
    ends = engine.run([Ask(prompt, 1.0, 3) for prompt in prompts])
    options: list[dict[str, Any]] = [
        {"repetition_penalty": 1.6},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"min_tokens": 12, "stop_token_ids": list(ends[2].outputs[0].token_ids)},
        {"allowed_token_ids": list(range(0, VOCAB_SIZE, 3))},
        {"logprobs": 3},
        {"temperature": 0.8, "top_k": 1},
    ]
    plain = [Ask(prompt, 1.0, 24, sampling) for prompt, sampling in zip(prompts, options)]
    expected = engine.run(plain)
    assert not any(outcome["drafted"] for outcome in outcomes(expected))
    asks = [replace(ask, budget=None, options=LOSSLESS) for ask in plain]

    def check(outputs: Sequence[Any]) -> None:
        for sampling, output, reference in zip(options, outputs, expected):
            assert output.outputs[0].token_ids == reference.outputs[0].token_ids, sampling
            assert output.kv_transfer_params["buddy"]["drafted"] > 0, sampling
        for got, wanted in zip(outputs[4].outputs[0].logprobs, expected[4].outputs[0].logprobs):
            assert {token: one.logprob for token, one in got.items()} == pytest.approx(
                {token: one.logprob for token, one in wanted.items()}, abs=1e-4
            )

    check(engine.run(asks))
    answers = [[*ask.prompt, *output.outputs[0].token_ids[:-1]] for ask, output in zip(asks, expected)]
    draft_texts(engine, answers, monkeypatch)
    outputs = engine.run(asks)
    check(outputs)
    assert all(outcome["accepted"] > 3 for outcome in outcomes(outputs))


def test_a_seed_gives_the_same_answer_again(lossless_of: Callable[..., Engine]) -> None:
    """Fails if the answer to a seed depends on how many drafts there were, which follows the clock."""
    engine = lossless_of("llama")
    engine.configure(MASKED)
    prompt = tuple(random_prompts(1, seed=15, min_tokens=9, max_tokens=9)[0])
    seeded = Ask(prompt, 1.0, 20, {"temperature": 1.0, "seed": 7})
    expected = engine.run([seeded])[0].outputs[0].token_ids
    outputs = engine.run([replace(seeded, budget=None, options=LOSSLESS), *mixed_batch(seed=16)])
    assert outputs[0].outputs[0].token_ids == expected
    assert [outcome["drafted"] > 0 for outcome in outcomes(outputs)[:3]] == [False, False, True]


@pytest.mark.parametrize("verified", [True, False])
def test_sampled_tokens_have_the_full_models_distribution(
    lossless_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, verified: bool
) -> None:
    """Fails if drafts shift the distribution. With drafts that are accepted unverified, the test must notice."""
    engine = lossless_of("llama")
    engine.configure(MASKED)
    if not verified:
        monkeypatch.setattr(rejection_sampler, "rejection_sample", accept_all)
    prompt, num_samples = tuple(random_prompts(1, seed=5, min_tokens=12, max_tokens=12)[0]), 1200
    kind = {"temperature": 1.0, "top_k": 3}
    asks = [Ask(prompt, None, 3, kind, options=LOSSLESS)] * num_samples
    torch.manual_seed(0)
    seen = Counter(tuple(output.outputs[0].token_ids) for output in engine.run(asks))
    expected = expected_counts(engine, prompt, num_samples)
    likely = {tokens: count for tokens, count in expected.items() if count >= 5}
    rest = [num_samples - sum(seen[tokens] for tokens in likely), num_samples - sum(likely.values())]
    pairs = [(seen[tokens], count) for tokens, count in likely.items()] + ([tuple(rest)] if rest[1] >= 1 else [])
    statistic = sum((got - count) ** 2 / count for got, count in pairs)
    # Mean and variance of chi-square are n and 2 n; five standard deviations.
    limit = len(pairs) - 1 + 5 * math.sqrt(2 * (len(pairs) - 1))
    assert (set(seen) <= set(expected) and statistic < limit) == verified


def accept_all(
    draft_token_ids: torch.Tensor, num_draft_tokens: list[int], max_spec_len: int, *args: Any, **_: Any
) -> torch.Tensor:
    """What vLLM's rejection_sample would be if it verified nothing."""
    bonus_token_ids = args[3]
    result = torch.full((len(num_draft_tokens), max_spec_len + 1), -1, dtype=torch.int32)
    begin = 0
    for row, num in enumerate(num_draft_tokens):
        result[row, :num] = draft_token_ids[begin : begin + num]
        result[row, num] = bonus_token_ids[row, 0]
        begin += num
    return result


def expected_counts(engine: Engine, prompt: tuple[int, ...], num_samples: int) -> dict[tuple[int, ...], float]:
    """How often each answer of three tokens is expected, each token one of the three likeliest."""
    counts = {(): float(num_samples)}
    for _ in range(3):
        longer = {}
        for tokens, count in counts.items():
            text = [*prompt, *tokens]
            logits = routed_logits(engine.tiny.model, text, [full_path(NUM_LAYERS)] * len(text), MASKED)[-1]
            values, ids = logits.topk(3)
            for token, share in zip(ids.tolist(), values.softmax(dim=-1).tolist()):
                longer[*tokens, token] = count * share
        counts = longer
    return counts
