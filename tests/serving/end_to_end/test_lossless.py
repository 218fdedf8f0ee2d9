"""Lossless mode: drafts on a short path, checked by all layers, give the tokens of the full model."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.sample import rejection_sampler

from tests.harness.batches import batch
from tests.harness.engine import MAX_MODEL_LEN, Ask, Engine, Tiny, make_tiny, start_engine
from tests.harness.tiny_models import NUM_LAYERS, VOCAB_SIZE, random_prompts
from vllm_buddy.method import full_path
from vllm_buddy.method.kv_policy import KV_POLICIES, MASKED
from vllm_buddy.method.reference import routed_logits
from vllm_buddy.serving.schedule.draft_pace import DEPTH_DRAFTS, Acceptance, Drafting, DraftPass
from vllm_buddy.serving.worker.depth_drafts import _ngram_proposer

SPECULATOR = {"method": "custom_class", "model": DEPTH_DRAFTS, "num_speculative_tokens": 4}
LOSSLESS = {"buddy_mode": "lossless"}


def start_lossless(tiny: Tiny, **drafts: Any) -> Engine:
    # A given row_cost: how many drafts there are must not depend on how busy the machine is.
    settings = {"depth": 7, "ngram_max": 0, "acceptance": 0.9, "row_cost": 0.05, **drafts}
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
    monkeypatch.setattr(Drafting, "_num_passes", lambda *_: 3)


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


def test_steps_tell_what_rows_and_passes_cost(
    lossless_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if drafts are paced by what they are expected to cost, though steps have shown what they do."""
    engine = lossless_of("llama")
    engine.configure(MASKED)
    seen: list[tuple[int, float, float]] = []
    monkeypatch.setattr(engine.scheduler._drafting.costs, "observe", lambda *step: seen.append(step))
    [prompt] = random_prompts(1, seed=3, min_tokens=9, max_tokens=9)
    engine.run([Ask(tuple(prompt), None, 12, options=LOSSLESS)])
    rows, pass_costs, seconds = zip(*seen)
    assert rows[0] == 4  # the step with the prompt tells nothing; the one after it has a token and three drafts
    assert 0.0 < pass_costs[0] == pytest.approx(3 * engine.scheduler._drafting.passes.drafting.cost)
    assert rows[-1] <= 4
    assert pass_costs[-1] == 0.0  # no draft has room after the last token
    assert all(0.0 < second < 60.0 for second in seconds)


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


@pytest.fixture(scope="session")
def numba() -> None:
    """Numba, with which vLLM compiles its drafter, so that engines can start in this process afterwards.

    vLLM 0.32 looks into all objects of all modules when an engine starts on CPU. One of llvmlite's takes every name for
    that of a function, `__dict__` too, and the engine ends.
    """
    from llvmlite.binding import ffi

    ffi.lib._fntab["__dict__"] = {}


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


def repeats_itself(prompt: tuple[int, ...], answer: list[int]) -> bool:
    """Whether two tokens that stand together at the end of what is known stood together before, with room to draft."""
    text = [*prompt, *answer]
    pairs = list(pairwise(text))
    return any(pairs[end - 1] in pairs[: end - 1] for end in range(len(prompt), len(text) - 2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3], [4, 5, 6, 7]),  # three tokens again, and what followed them
        ([1, 2, 3, 8, 2, 3, 9, 5, 1, 2, 3], [8, 2, 3, 9]),  # the longest n-gram, not the newest
        ([6, 1, 2, 3, 4, 5, 7, 8, 9, 9, 6, 1, 2, 3, 4, 5], [7, 8, 9, 9]),  # longer than the longest that is looked up
        ([3, 4, 5, 6, 3], []),  # one token again is below the shortest
        ([1, 2, 3, 4, 5], []),
    ],
)
def test_ngrams_are_looked_up_within_the_lengths_of_the_settings(
    numba: None, text: list[int], expected: list[int]
) -> None:
    """Fails if drafts.ngram_min or ngram_max does not reach vLLM's drafter, or its own configuration is changed."""
    config: Any = SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=4, prompt_lookup_min=0, prompt_lookup_max=0),
        model_config=SimpleNamespace(max_model_len=64),
        scheduler_config=SimpleNamespace(max_num_seqs=2),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    assert _ngram_proposer(config, 2, 0) is None
    proposer = _ngram_proposer(config, 2, 4)
    assert (proposer.min_n, proposer.max_n) == (2, 4)
    assert (config.speculative_config.prompt_lookup_min, config.speculative_config.prompt_lookup_max) == (0, 0)
    token_ids = np.zeros((1, 64), dtype=np.int32)
    token_ids[0, : len(text)] = text
    found = proposer.propose(4, [[text[-1]]], np.array([len(text)], dtype=np.int32), token_ids)
    assert found == [expected]


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

    drafting = engine.scheduler._drafting
    monkeypatch.setattr(drafting, "settings", drafting.settings.model_copy(update={"ngram_max": 4}))
    monkeypatch.setattr(engine.runner.drafter, "_ngrams", Ngrams())


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
    drafting = engine.scheduler._drafting
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
    before = engine.scheduler._drafting._ngrams.tried
    outputs = engine.run(asks, [0, 6])
    engine.check(asks, outputs)
    assert [outcome["drafted"] > 0 for outcome in outcomes(outputs)] == [True, False]
    assert engine.scheduler._drafting._ngrams.tried == before


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
