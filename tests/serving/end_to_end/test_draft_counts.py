"""Which drafts count: in the response, in what paces them, and in what a step does."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.harness.engine import Ask, Engine
from tests.harness.lossless import LOSSLESS, draft_answers, outcomes
from tests.harness.tiny_models import random_prompts
from vllm_buddy.method.kv_policy import MASKED
from vllm_buddy.serving.schedule.draft_pace import Acceptance

pytestmark = pytest.mark.usefixtures("always_draft")


def test_steps_tell_what_rows_and_passes_cost(
    lossless_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if drafts are paced by what they are expected to cost, though steps have shown what they do."""
    engine = lossless_of("llama")
    engine.configure(MASKED)
    seen: list[tuple[int, float, float]] = []
    monkeypatch.setattr(engine.scheduler._drafts.drafting.costs, "observe", lambda *step: seen.append(step))
    [prompt] = random_prompts(1, seed=3, min_tokens=9, max_tokens=9)
    engine.run([Ask(tuple(prompt), None, 12, options=LOSSLESS)])
    rows, pass_costs, seconds = zip(*seen)
    assert rows[0] == 4  # the step with the prompt tells nothing; the one after it has a token and three drafts
    assert 0.0 < pass_costs[0] == pytest.approx(3 * engine.scheduler._drafts.drafting.passes.drafting.cost)
    assert rows[-1] <= 4
    assert pass_costs[-1] == 0.0  # no draft has room after the last token
    assert all(0.0 < second < 60.0 for second in seconds)


def test_metrics_count_the_drafts_that_responses_tell(
    lossless_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the figures of drafts on layers do not reach /metrics: a dashboard would show none."""
    engine = lossless_of("llama")
    engine.configure(MASKED)
    metrics, seen = engine.scheduler._metrics, Counter[str]()
    monkeypatch.setattr(metrics, "_count", lambda name, number, *_: seen.update({name: number}))
    prompts = [tuple(prompt) for prompt in random_prompts(3, seed=5, min_tokens=9, max_tokens=12)]
    told = outcomes(engine.run([Ask(prompt, None, 16, options=LOSSLESS) for prompt in prompts]))
    assert seen["depth_drafts"] == sum(outcome["drafted"] for outcome in told) > 0
    assert seen["depth_drafts_accepted"] == sum(outcome["accepted"] for outcome in told)
    assert seen["layer_tokens_drafting"] > 0


def test_steps_without_drafts_leave_out_the_rejection_sampler(
    lossless_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if requests that get no drafts pay for those that others get, or a step with drafts is not checked."""
    engine = lossless_of("llama")
    engine.configure(MASKED)
    checked: list[list[int]] = []
    forward = engine.runner.rejection_sampler.forward

    def watched(metadata: Any, *others: Any) -> Any:
        checked.append(metadata.num_draft_tokens)
        return forward(metadata, *others)

    monkeypatch.setattr(engine.runner.rejection_sampler, "forward", watched)
    first, second = (tuple(prompt) for prompt in random_prompts(2, seed=21, min_tokens=9, max_tokens=12))
    engine.run([Ask(first, 0.5, 8)])
    assert checked == []
    engine.run([Ask(first, 0.5, 8), Ask(second, None, 8, options=LOSSLESS)])
    assert checked
    assert all(any(of_step) for of_step in checked)


def test_drafts_after_a_stop_token_are_not_counted(
    lossless_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the response counts drafts that were confirmed behind the token with which the answer stops."""
    engine = lossless_of("llama")
    engine.configure(MASKED)
    [prompt] = random_prompts(1, seed=6, min_tokens=9, max_tokens=9)
    ask = Ask(tuple(prompt), None, 24, options=LOSSLESS)
    answer = engine.expected(ask).token_ids
    draft_answers(engine, [ask], monkeypatch)
    cut = 0
    for stop in dict.fromkeys(answer):
        (output,) = engine.run([replace(ask, sampling={"stop_token_ids": [stop]})])
        expected = answer[: answer.index(stop) + 1]
        assert list(output.outputs[0].token_ids) == expected
        (told,) = outcomes([output])
        assert told["tokens"] == len(prompt) + len(expected) - 1
        assert told["decoded"]["tokens"] == len(expected) - 1
        cut += told["drafted"] - told["accepted"]
    assert cut > 0, "no answer stopped within its drafts"


@pytest.mark.parametrize("num_allowed", [0, 1])
def test_drafts_that_a_grammar_forbids_are_wrong_ones(
    lossless_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, num_allowed: int
) -> None:
    """Fails if layers go on drafting for an answer whose grammar allows none of their drafts, or only the first."""
    engine = lossless_of("llama")
    engine.configure(MASKED)
    manager = engine.scheduler.structured_output_manager
    if not hasattr(manager, "validate_tokens"):
        pytest.skip("vLLM 0.29 asks the grammar of a request itself")
    ask = Ask(tuple(random_prompts(1, seed=17, min_tokens=9, max_tokens=9)[0]), None, 12, options=LOSSLESS)
    monkeypatch.setattr(manager, "validate_tokens", lambda _, tokens: tokens[:num_allowed])
    drafting = engine.scheduler._drafts.drafting
    monkeypatch.setattr(drafting, "_by_depth", Acceptance.expected(0.9, 0.98))
    outputs = engine.run([ask])
    assert outcomes(outputs)[0]["drafted"] <= num_allowed * 12
    assert drafting._by_depth.value < 0.6


def test_rows_that_fill_up_a_first_step_are_no_drafts(lossless_of: Callable[..., Engine]) -> None:
    """Fails if a response and the estimates count rows for which vLLM had no draft.

    It adds them to the first step of a request that has one token left to compute, while others decode.
    """
    engine = lossless_of("llama")
    engine.configure(MASKED)
    long = tuple(random_prompts(1, seed=18, min_tokens=30, max_tokens=30)[0])
    asks = [Ask(long, None, 30, options=LOSSLESS), Ask((5,), 0.5, 1)]
    before = engine.scheduler._drafts.drafting._ngrams.tried
    outputs = engine.run(asks, [0, 6])
    engine.check(asks, outputs)
    assert [outcome["drafted"] > 0 for outcome in outcomes(outputs)] == [True, False]
    assert engine.scheduler._drafts.drafting._ngrams.tried == before
