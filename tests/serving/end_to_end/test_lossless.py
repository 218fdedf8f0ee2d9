"""Lossless mode: drafts on a short path, checked by all layers, give the tokens of the full model."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from tests.harness.engine import Ask, Engine, Tiny, start_engine
from tests.harness.tiny_models import NUM_LAYERS
from tests.serving.end_to_end.test_golden import batch
from vllm_buddy.method import full_path
from vllm_buddy.method.kv_policy import KV_POLICIES, MASKED
from vllm_buddy.method.reference import routed_logits
from vllm_buddy.serving.schedule.draft_pace import DEPTH_DRAFTS, DraftPace

SPECULATOR = {"method": "custom_class", "model": DEPTH_DRAFTS, "num_speculative_tokens": 4}
LOSSLESS = {"buddy_mode": "lossless"}


def start_lossless(tiny: Tiny, **drafts: Any) -> Engine:
    settings = {"depth": 7, "ngram_max": 0, "acceptance": 0.9, **drafts}
    return start_engine(tiny, speculative_config=dict(SPECULATOR), buddy={"drafts": settings})


@pytest.fixture(scope="session")
def lossless_of(tiny: Callable[[str], Tiny]) -> Callable[..., Engine]:
    """The routed engine with the lossless drafter of a family, with a refining pass or without, started once."""
    started: dict[Any, Engine] = {}

    def get(family: str, *, refined: bool = False) -> Engine:
        if (family, refined) not in started:
            started[family, refined] = start_lossless(
                tiny(family), **({"depth": 4, "refine_depth": 7} if refined else {})
            )
        return started[family, refined]

    return get


@pytest.fixture(params=["llama", "qwen2", "qwen3", "llama-refined"])
def lossless(request: pytest.FixtureRequest, lossless_of: Callable[..., Engine]) -> Iterator[Engine]:
    family, _, refined = request.param.partition("-")
    engine = lossless_of(family, refined=bool(refined))
    yield engine
    engine.abort_all()


@pytest.fixture(autouse=True)
def always_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models reject nearly all drafts, so that a real pace would make none."""
    monkeypatch.setattr(DraftPace, "num_drafts", lambda *_: 3)


def mixed_batch(seed: int, num_tokens: int = 20) -> list[Ask]:
    """Requests of the golden batch, every other one in lossless mode instead."""
    asks = batch(seed)
    return [
        Ask(a.prompt, None, num_tokens, options=LOSSLESS) if i % 2 else Ask(a.prompt, a.budget, num_tokens)
        for i, a in enumerate(asks)
    ]


def outcomes(outputs: Sequence[Any]) -> list[dict[str, Any]]:
    return [output.kv_transfer_params["buddy"] for output in outputs]


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
    drafter, seen = lossless.runner.drafter, []
    propose = drafter.propose

    def watched(sampled: Any, num_tokens: Any, token_ids: Any, **kwargs: Any) -> Any:
        found = propose(sampled, num_tokens, token_ids, **kwargs)
        seen.extend((token_ids[i, : num_tokens[i]].tolist(), drafts) for i, drafts in enumerate(found) if drafts)
        return found

    monkeypatch.setattr(drafter, "propose", watched)
    lossless.configure(MASKED)
    lossless.run([Ask(ask.prompt, None, 8, options=LOSSLESS) for ask in batch(seed=3)[:4]])
    assert len(seen) > 20
    paths = drafter._drafts
    for known, drafts in seen[::5]:
        chain = draft_chain(lossless, known, paths.path, 3 if paths.refined else len(drafts))
        if paths.refined is not None:
            checked = after_each(lossless, known[:-1], [known[-1], *chain], paths.refined)
            agreed = next((i for i, token in enumerate(chain) if token != checked[i]), len(chain))
            chain = [*chain[:agreed], checked[agreed]]
        assert drafts == chain[: len(drafts)]


def draft_chain(engine: Engine, known: list[int], path: int, length: int) -> list[int]:
    chain: list[int] = []
    for _ in range(length):
        chain.append(after_each(engine, known[:-1], [known[-1], *chain], path)[-1])
    return chain


@torch.no_grad()
def after_each(engine: Engine, prefix: list[int], token_ids: list[int], path: int) -> list[int]:
    """What the reference says after each of token_ids on `path`, which follow a prefix at full depth."""
    paths = [full_path(NUM_LAYERS)] * len(prefix) + [path] * len(token_ids)
    logits = routed_logits(engine.tiny.model, [*prefix, *token_ids], paths, MASKED, engine.tiny.artifact.bypass)
    return logits[len(prefix) :].argmax(dim=-1).tolist()
