"""Cases: how the next token is chosen, and what is told about it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from tools.features.case import Differs, case
from tools.features.client import Client, text_of, token_ids

_GROUP = "Sampling"
_STORY = "Once upon a time there was a"
_LONG = "The lighthouse keeper wrote down what the sea brought. " * 20  # several steps of a chunked prefill
_SAMPLED: dict[str, Any] = {"temperature": 1.2, "top_p": 0.95, "max_tokens": 12}
_CLOSE = 2e-3  # nats: rounding of fp32 in batches of other sizes


@case(_GROUP, "n > 1: each sample is that of its own seed")
def several_samples(c: Client) -> Any:
    """vLLM gives sample i the seed `seed + i`; its route is its own, so it is the request with that seed."""
    together = c.complete(_STORY, n=3, seed=5, **_SAMPLED)
    alone = [token_ids(c.complete(_STORY, seed=5 + i, **_SAMPLED))[0] for i in range(3)]
    assert token_ids(together) == alone
    assert len({tuple(sample) for sample in alone}) == 3
    return alone


@case(_GROUP, "n > 1: metrics count each sample")
def samples_in_metrics(c: Client) -> Any:
    """Each sample is a request of its own in the metrics."""
    before = c.metric("vllm_buddy:budget_count")
    c.complete(_STORY, n=3, seed=1, **_SAMPLED)
    c.wait_idle()
    if c.routed:
        assert c.metric("vllm_buddy:budget_count") - before >= 3


@case(_GROUP, "n > 1: outcome in the response")
def outcome_of_samples(c: Client) -> Any:
    """vLLM passes on what one sample's engine request tells, and not which; the plugin collects them."""
    answer = c.complete(_STORY, n=3, seed=1, **_SAMPLED)
    if not c.routed:
        return None
    told = answer["kv_transfer_params"]["buddy"]["samples"]
    assert [outcome["decoded"]["tokens"] for outcome in told] == [len(sample) - 1 for sample in token_ids(answer)]
    return None


def _neighbours(c: Client) -> list[Callable[[], Any]]:
    """Requests of several budgets that draw random numbers of their own."""
    return [partial(c.at(b).complete, f"Number {i}:", temperature=1.0) for i, b in enumerate((1.0, 0.75, 0.5))]


@case(_GROUP, "seed: the same alone and in a batch")
def seed_in_a_batch(c: Client) -> Any:
    """Other requests must not change the order in which random numbers are drawn."""
    seeded = partial(c.complete, _STORY, seed=11, **_SAMPLED)
    alone = token_ids(seeded())
    assert token_ids(c.at_once(*_neighbours(c), seeded)[-1]) == alone
    return alone


@case(_GROUP, "seed: beside a prompt in chunks")
def seed_of_a_long_prompt(c: Client) -> Any:
    """Nor must chunks of a prompt change it."""
    if not c.routed:
        return None  # it ends stock vLLM's engine on CPU
    seeded = partial(c.complete, _LONG, seed=11, **_SAMPLED)
    assert token_ids(seeded()) == token_ids(c.at_once(*_neighbours(c), seeded)[-1])
    return None


@case(_GROUP, "greedy: the same alone and in a batch of budgets")
def greedy_in_a_batch(c: Client) -> Any:
    """A request's tokens must not depend on its neighbours."""
    greedy = partial(c.complete, _STORY, max_tokens=16)
    others = [partial(c.at(b).complete, f"Number {i}:", max_tokens=16) for i, b in enumerate((1.0, 0.75, 0.5, 0.6))]
    alone = token_ids(greedy())
    assert token_ids(c.at_once(*others, greedy)[-1]) == alone
    return alone


@case(_GROUP, "top_k, min_p, penalties")
def other_samplers(c: Client) -> Any:
    """The samplers see logits only."""
    greedy = token_ids(c.complete(_STORY))
    assert token_ids(c.complete(_STORY, temperature=1.0, top_k=1)) == greedy
    assert token_ids(c.complete(_STORY, temperature=1.0, min_p=1.0)) == greedy
    penalised = c.complete(_STORY, max_tokens=16, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.5)
    return greedy, token_ids(penalised)


@case(_GROUP, "logprobs")
def logprobs(c: Client) -> Any:
    """The token that greedy decoding takes is the likeliest."""
    answer = c.complete(_STORY, logprobs=3)
    told = answer["choices"][0]["logprobs"]
    assert len(told["token_logprobs"]) == len(token_ids(answer)[0]) == 8
    for own, top in zip(told["token_logprobs"], told["top_logprobs"]):
        assert len(top) in (3, 4)
        assert own == max(top.values())
        assert sum(math.exp(v) for v in top.values()) <= 1 + 1e-6
    chat = c.chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in chat)
    return told["token_logprobs"]


@case(_GROUP, "prompt_logprobs: chunked prefill, other requests, cached prompt")
def prompt_logprobs(c: Client) -> Any:
    """Neither the steps in which a prompt is computed nor what is cached may change its log-probabilities."""
    scored = partial(c.complete, _LONG, prompt_logprobs=0, max_tokens=1)
    first = _prompt_logprobs(scored())
    assert len(first) == len(token_ids_of_prompt(c, _LONG)) - 1
    c.complete(_LONG)  # now it is in the prefix cache
    others = [partial(c.at(b).complete, f"{i} " + _LONG) for i, b in enumerate((1.0, 0.75))]
    for again in (scored(), c.at_once(*others, scored)[-1]):
        found = _prompt_logprobs(again)
        assert max(abs(a - b) for a, b in zip(first, found, strict=True)) < _CLOSE
    return None


@case(_GROUP, "echo, with logprobs")
def echo(c: Client) -> Any:
    """Scoring harnesses read a prompt's log-probabilities in this way."""
    answer = c.complete(_STORY, echo=True, logprobs=1, max_tokens=1, return_token_ids=False)
    assert text_of(answer).startswith(_STORY)
    told = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert told[0] is None
    assert all(value <= 0 for value in told[1:])
    scored = c.complete(_STORY, echo=True, logprobs=1, max_tokens=0, return_token_ids=False)
    again = scored["choices"][0]["logprobs"]["token_logprobs"]
    assert max(abs(a - b) for a, b in zip(told[1:-1], again[1:])) < _CLOSE
    return text_of(answer)


@case(_GROUP, "logit_bias, allowed_token_ids")
def forced_tokens(c: Client) -> Any:
    """A forced token is routed like any other."""
    forced = c.complete(_STORY, logit_bias={"77": 100})
    assert token_ids(forced) == [[77] * 8]
    allowed = c.complete(_STORY, allowed_token_ids=[100, 200])
    assert set(token_ids(allowed)[0]) <= {100, 200}
    return token_ids(allowed)


@case(_GROUP, "bad_words")
def bad_words(c: Client) -> Any:
    """A word that greedy decoding would take does not come."""
    words = ("red", "blue", "green", "house")
    allowed = [token_ids_of_prompt(c, f" {word}")[0] for word in words]
    taken = text_of(c.complete(_STORY, allowed_token_ids=allowed, max_tokens=1)).strip()
    assert taken in words
    answer = c.complete(_STORY, allowed_token_ids=allowed, bad_words=[taken])
    assert taken not in text_of(answer).split()
    return text_of(answer)


@case(_GROUP, "min_tokens, stop_token_ids, ignore_eos")
def lengths(c: Client) -> Any:
    """The first token would end the answer; min_tokens forbids it for a while."""
    first = token_ids(c.complete(_STORY, max_tokens=1))[0][0]
    stopped = c.complete(_STORY, stop_token_ids=[first])
    assert (len(token_ids(stopped)[0]), stopped["choices"][0]["finish_reason"]) == (1, "stop")
    assert stopped["choices"][0]["stop_reason"] == first
    longer = c.complete(_STORY, stop_token_ids=[first], min_tokens=5, ignore_eos=True)
    assert len(token_ids(longer)[0]) >= 5
    assert first not in token_ids(longer)[0][:5]
    return token_ids(longer)


@case(_GROUP, "stop strings across tokens")
def stop_strings(c: Client) -> Any:
    """A stop string that begins within one token and ends within the next."""
    words = c.complete(_STORY, logprobs=0, max_tokens=12)["choices"][0]
    whole, tokens = words["text"], words["logprobs"]["tokens"]
    first = next(i for i in range(1, len(tokens) - 1) if tokens[i] and tokens[i + 1])
    stop = tokens[first][-1] + tokens[first + 1][0]
    cut = c.complete(_STORY, stop=[stop], max_tokens=12, tells=False)
    assert text_of(cut) == whole[: whole.index(stop)]
    assert (cut["choices"][0]["finish_reason"], cut["choices"][0]["stop_reason"]) == ("stop", stop)
    assert cut["usage"]["completion_tokens"] <= first + 2
    included = c.complete(_STORY, stop=[stop], max_tokens=12, include_stop_str_in_output=True, tells=False)
    assert text_of(included) == whole[: whole.index(stop)] + stop
    return text_of(cut)


@case(_GROUP, "stop strings: outcome in the response")
def outcome_of_stopped(c: Client) -> Any:
    """The API server finds a stop string in the text and answers before the engine has ended the request."""
    before = c.metric("vllm_buddy:budget_count")
    stopped = c.complete(_STORY, stop=[text_of(c.complete(_STORY, max_tokens=1))], tells=False)
    assert stopped["choices"][0]["finish_reason"] == "stop"
    if not c.routed:
        return None
    c.wait_idle()
    assert c.metric("vllm_buddy:budget_count") >= before + 2
    assert stopped["kv_transfer_params"] is None
    return Differs("the response does not tell it, because the API server ends the request; metrics count the request")


@case(_GROUP, "beam search")
def beam_search(c: Client) -> Any:
    """vLLM makes the requests of the beams itself, without extra arguments."""
    status, answer = c.ask("/v1/completions", prompt=_STORY, use_beam_search=True, n=2, max_tokens=4)
    assert status == 200, answer
    assert len(answer["choices"]) == 2
    if c.routed and c.budget != 1.0:
        return Differs("runs at the server's default budget, because vLLM passes no extra arguments to its beams")
    return [choice["text"] for choice in answer["choices"]]


def token_ids_of_prompt(c: Client, text: str) -> list[int]:
    """The ids that the server's tokenizer gives."""
    status, answer = c.post("/tokenize", {"model": "model", "prompt": text})
    assert status == 200, answer
    return list(answer["tokens"])


def _prompt_logprobs(answer: Any) -> list[float]:
    told = answer["choices"][0]["prompt_logprobs"]
    ids = answer["choices"][0]["prompt_token_ids"]
    assert told[0] is None
    return [entry[str(token_id)]["logprob"] for entry, token_id in zip(told[1:], ids[1:], strict=True)]
