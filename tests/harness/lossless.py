"""Lossless mode on a tiny model: an engine that drafts, requests that ask for it, and what n-grams are to draft."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.harness.batches import batch
from tests.harness.engine import Ask, Engine, Tiny, start_engine
from vllm_buddy.serving.schedule.draft_pace import DEPTH_DRAFTS

SPECULATOR = {"method": "custom_class", "model": DEPTH_DRAFTS, "num_speculative_tokens": 4}
LOSSLESS = {"buddy_mode": "lossless"}


def start_lossless(tiny: Tiny, **drafts: Any) -> Engine:
    # A given row_cost: how many drafts there are must not depend on how busy the machine is.
    settings = {"depth": 7, "ngram_max": 0, "acceptance": 0.9, "row_cost": 0.05, **drafts}
    return start_engine(tiny, speculative_config=dict(SPECULATOR), buddy={"drafts": settings})


def mixed_batch(seed: int, num_tokens: int = 20) -> list[Ask]:
    """Requests of the golden batch, every other one in lossless mode instead."""
    asks = batch(seed)
    return [
        Ask(a.prompt, None, num_tokens, options=LOSSLESS) if i % 2 else Ask(a.prompt, a.budget, num_tokens)
        for i, a in enumerate(asks)
    ]


def outcomes(outputs: Sequence[Any]) -> list[dict[str, Any]]:
    return [output.kv_transfer_params["buddy"] for output in outputs]


def draft_answers(engine: Engine, known: Sequence[Ask], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let n-grams draft what the model answers to requests, whatever it is."""
    draft_texts(engine, [[*ask.prompt, *engine.expected(ask).token_ids[:-1]] for ask in known], monkeypatch)


def draft_texts(engine: Engine, texts: Sequence[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let n-grams draft how one of the texts goes on."""

    class Ngrams:
        def propose(self, most: int, sampled: Any, num_tokens: Any, token_ids: Any) -> list[list[int]]:
            known = [token_ids[i, : num_tokens[i]].tolist() if new else [] for i, new in enumerate(sampled)]
            return [self.after(text)[:most] for text in known]

        def after(self, begun: list[int]) -> list[int]:
            return next((text[len(begun) :] for text in texts if begun and text[: len(begun)] == begun), [])

    drafting = engine.scheduler._drafts.drafting
    monkeypatch.setattr(drafting, "settings", drafting.settings.model_copy(update={"ngram_max": 4}))
    monkeypatch.setattr(engine.runner.drafter, "_ngrams", Ngrams())
