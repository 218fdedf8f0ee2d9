"""Drafts of n-grams in lossless mode, which come before those of layers."""

from collections.abc import Callable
from itertools import pairwise

import pytest

from tests.harness.engine import Ask, Engine, Tiny, start_engine
from tests.harness.lossless import LOSSLESS, SPECULATOR, draft_answers, mixed_batch, outcomes, start_lossless
from tests.harness.tiny_models import random_prompts
from vllm_buddy.method.kv_policy import MASKED
from vllm_buddy.serving.schedule.draft_pace import Drafting


@pytest.mark.usefixtures("always_draft")
def test_layers_draft_where_no_ngram_is_found(
    lossless_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if n-grams are dropped, layers draft beside them, or lossy requests get drafts from layers."""
    engine = lossless_of("llama")
    engine.configure(MASKED, 4)
    asks = mixed_batch(seed=9)
    known = asks[:3]  # of these, one is lossless

    draft_answers(engine, known, monkeypatch)
    outputs = engine.run(asks)
    engine.check(asks, outputs)
    told = outcomes(outputs)
    for ask, outcome in zip(asks, told):
        by_ngram, lossless = ask in known, ask.options == LOSSLESS
        assert (outcome["accepted"] > 10) == by_ngram
        assert (outcome["drafted"] > 0) == (by_ngram or lossless)
        if not lossless:
            assert outcome["layers_drafting_mean"] == 0
        elif not by_ngram:
            assert outcome["layers_drafting_mean"] > 0


def test_ngrams_are_those_of_vllms_own_drafter(
    numba: None, tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if vLLM's drafter of n-grams, here as real as in a server, drafts nothing or changes an answer."""
    monkeypatch.setattr(Drafting, "_num_passes", lambda *_: 0)
    engine = start_lossless(tiny("llama"), ngram_max=4, ngram_min=2, row_cost=0.0)
    engine.configure(MASKED)
    prompts = [tuple(prompt) * 3 for prompt in random_prompts(10, seed=17, min_tokens=3, max_tokens=9)]
    # After two of them the model repeats itself, too.
    asks = [Ask(prompts[5], None, 32, options=LOSSLESS), Ask(prompts[6], 0.5, 32)]
    asks.append(Ask(tuple(range(9)), None, 5, options=LOSSLESS))
    outputs = [engine.run([ask])[0] for ask in asks]
    engine.check(asks, outputs)
    told = outcomes(outputs)
    drafted = [outcome["drafted"] > 0 for outcome in told]
    assert drafted == [repeats_itself(ask.prompt, engine.expected(ask).token_ids) for ask in asks]
    assert drafted == [True, True, False]
    assert sum(outcome["accepted"] for outcome in told) > 0
    for outcome in told:  # what a rejected draft ran counts, and no pass was made
        rejected = outcome["drafted"] - outcome["accepted"]
        assert outcome["layers_drafting_mean"] * outcome["tokens"] == pytest.approx(outcome["depth"] * rejected)


def test_drafts_as_a_server_makes_them_by_default(numba: None, tiny: Callable[[str], Tiny]) -> None:
    """Fails if what no test sets, the pace, measured costs and all sources of drafts at once, changes an answer."""
    engine = start_engine(tiny("llama"), speculative_config=dict(SPECULATOR))
    engine.configure(MASKED, 4)
    prompts = [tuple(prompt) * 3 for prompt in random_prompts(6, seed=17, min_tokens=3, max_tokens=9)]
    asks = [Ask(p, None, 48, options=LOSSLESS) if i % 2 else Ask(p, 0.5, 48) for i, p in enumerate(prompts)]
    outputs = engine.run(asks)
    engine.check(asks, outputs)
    drafted = [outcome["drafted"] for outcome in outcomes(outputs)]
    assert sum(drafted[::2]) > 0  # by n-grams
    assert sum(drafted[1::2]) > 0


def repeats_itself(prompt: tuple[int, ...], answer: list[int]) -> bool:
    """Whether two tokens that stand together at the end of what is known stood together before, with room to draft."""
    text = [*prompt, *answer]
    pairs = list(pairwise(text))
    return any(pairs[end - 1] in pairs[: end - 1] for end in range(len(prompt), len(text) - 2))
