"""Lossless mode: drafts on a short path, checked by all layers, give the tokens of the full model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.harness.batches import batch
from tests.harness.engine import MAX_MODEL_LEN, Ask, Engine, make_tiny
from tests.harness.lossless import LOSSLESS, mixed_batch, outcomes, start_lossless
from tests.harness.tiny_models import NUM_LAYERS, random_prompts
from vllm_buddy.method import full_path
from vllm_buddy.method.kv_policy import KV_POLICIES, MASKED
from vllm_buddy.method.reference import routed_logits
from vllm_buddy.serving.schedule.draft_pace import DraftPass

pytestmark = pytest.mark.usefixtures("always_draft")


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_tokens_are_those_of_the_full_model_beside_lossy_requests(lossless: Engine, policy: str) -> None:
    """Fails if what a draft leaves in the cache is read, or a lossy neighbour reads or changes it."""
    lossless.configure(policy, 4)
    asks = mixed_batch(seed=1)
    outputs = lossless.run(asks)
    lossless.check(asks, outputs)
    for ask, outcome in zip(asks, outcomes(outputs)):
        drafts = ask.options == LOSSLESS
        assert outcome["mode"] == ("lossless" if drafts else "budget")
        assert (outcome["drafted"] > 0) == (outcome["layers_drafting_mean"] > 0) == drafts
    assert sum(outcome["accepted"] for outcome in outcomes(outputs)) > 0


def test_no_draft_is_made_that_the_answer_has_no_room_for(lossless_of: Callable[..., Engine]) -> None:
    """Fails if a pass drafts the last token of an answer, which the next step gives anyway."""
    engine = lossless_of("llama")
    engine.configure(MASKED)
    [prompt] = random_prompts(1, seed=8, min_tokens=9, max_tokens=9)
    asks = [Ask(tuple(prompt), None, num_tokens, options=LOSSLESS) for num_tokens in (1, 2, 3)]
    outputs = engine.run(asks)
    engine.check(asks, outputs)
    assert [outcome["drafted"] for outcome in outcomes(outputs)] == [0, 0, 1]


def test_a_request_that_comes_to_the_longest_length_leaves_others_alone(lossless_of: Callable[..., Engine]) -> None:
    """Fails if all requests get drafts of token 0 while one is about to reach max_model_len."""
    engine = lossless_of("llama")
    engine.configure(MASKED)
    [long] = random_prompts(1, seed=1, min_tokens=MAX_MODEL_LEN - 9, max_tokens=MAX_MODEL_LEN - 9)
    asks = [Ask(tuple(long), None, 9, options=LOSSLESS), Ask(tuple(long[:20]), 0.5, 12)]
    outputs = engine.run(asks)
    engine.check(asks, outputs)
    longest, other = outcomes(outputs)
    assert longest["drafted"] > 0
    assert other["drafted"] == 0


@pytest.mark.slow
def test_two_hundred_prompts_are_answered_as_by_the_full_model(lossless_of: Callable[..., Engine]) -> None:
    """Fails if a rare course of drafts, neighbours, preemptions and cache hits changes a token."""
    engine = lossless_of("llama")
    engine.configure(MASKED, 4)
    prompts = random_prompts(200, seed=77, min_tokens=2, max_tokens=60)
    budgets = (0.5, 0.75, 0.4)
    asks = [
        Ask(tuple(prompt), budgets[i // 3 % 3], 8) if i % 3 == 2 else Ask(tuple(prompt), None, 16, options=LOSSLESS)
        for i, prompt in enumerate(prompts)
    ]
    # Sixteen run at once; the others arrive while these decode.
    outputs = engine.run(asks, [i // 4 for i in range(200)], lambda step: step % 11 == 7 and engine.preempt(step))
    engine.check(asks, outputs)
    told = outcomes(outputs)
    assert 0 < sum(o["accepted"] for o in told) < sum(o["drafted"] for o in told)


def test_preemption_chunks_and_cache_hits_change_nothing(lossless: Engine) -> None:
    """Fails if drafts outlive the blocks they were written to."""
    lossless.configure(MASKED, 1, chunk=33)
    asks = mixed_batch(seed=2, num_tokens=32)

    def disturb(step: int) -> None:
        if step % 4 == 3:
            lossless.preempt(step)
        if step == 10:
            lossless.preempt_all()

    lossless.check(asks, lossless.run(asks, before_step=disturb))
    outputs = lossless.run(asks)
    lossless.check(asks, outputs)
    assert any(output.num_cached_tokens for output in outputs)


def test_drafts_are_what_the_path_says_after_a_prefix_at_full_depth(
    lossless: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a draft pass reads wrong K and V, so that it is accepted less often than the model allows."""
    check_drafts(lossless, monkeypatch)


@pytest.mark.parametrize("gaps", [False, True], ids=["adapters", "bypasses of gaps"])
def test_the_artifacts_exits_draft(
    gaps: bool, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if drafts of trained exits differ from the reference's, or an exit changes a token of an answer.

    Or if a token is drafted that is not among those of the artifact.
    """
    root = tmp_path_factory.mktemp("exits")
    tiny = make_tiny(root, "llama", bypass_rank=4, draft_depths=(4, 7), draft_vocabulary=60, draft_gaps=gaps)
    engine = start_lossless(tiny, depth=None, refine_depth=7)
    drafter, exits = engine.runner.drafter, tiny.artifact.drafts
    passes = drafter._drafts
    assert [passes.drafting.path, passes.refining.path] == [draft.path for draft in exits]
    check_drafts(engine, monkeypatch)
    drafter.use(replace(passes, refining=None))  # the refining pass corrects nearly all drafts of random models
    check_drafts(engine, monkeypatch)
    drafter.use(replace(drafter._drafts, vocabulary=None))
    check_drafts(engine, monkeypatch)
    asks = mixed_batch(seed=4)
    engine.check(asks, engine.run(asks))


def check_drafts(lossless: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare drafts of a few requests with those that the reference makes one by one."""
    drafter, seen = lossless.runner.drafter, []
    propose = drafter.propose

    def watched(sampled: Any, num_tokens: Any, token_ids: Any, **kwargs: Any) -> Any:
        found = propose(sampled, num_tokens, token_ids, **kwargs)
        seen.extend((token_ids[i, : num_tokens[i]].tolist(), drafts) for i, drafts in enumerate(found) if drafts)
        return found

    monkeypatch.setattr(drafter, "propose", watched)
    lossless.configure(MASKED)
    lossless.run([Ask(ask.prompt, None, 10, options=LOSSLESS) for ask in batch(seed=3)[:4]])
    assert len(seen) > 20
    first, second = drafter._drafts.drafting, drafter._drafts.refining
    for known, drafts in seen[::5]:
        chain = draft_chain(lossless, known, first, 3 if second else len(drafts))
        if second is not None:
            checked = after_each(lossless, known[:-1], [known[-1], *chain], second)
            agreed = next((i for i, token in enumerate(chain) if token != checked[i]), len(chain))
            chain = [*chain[:agreed], checked[agreed]]
        assert drafts == chain[: len(drafts)]


def draft_chain(engine: Engine, known: list[int], path: DraftPass, length: int) -> list[int]:
    chain: list[int] = []
    for _ in range(length):
        chain.append(after_each(engine, known[:-1], [known[-1], *chain], path)[-1])
    return chain


@torch.no_grad()
def after_each(engine: Engine, prefix: list[int], token_ids: list[int], path: DraftPass) -> list[int]:
    """What the reference says after each of token_ids on `path`, which follow a prefix at full depth."""
    paths, text = [full_path(NUM_LAYERS)] * len(prefix) + [path.path] * len(token_ids), [*prefix, *token_ids]
    bypass = path.bypass or engine.tiny.artifact.bypass
    logits = routed_logits(engine.tiny.model, text, paths, MASKED, bypass, path.adapter)
    vocabulary = engine.runner.drafter._drafts.vocabulary
    allowed = list(range(logits.shape[1])) if vocabulary is None else vocabulary.tolist()
    return [allowed[int(row[allowed].argmax())] for row in logits[len(prefix) :]]
