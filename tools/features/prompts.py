"""Cases: what a prompt can be."""

from functools import partial
from typing import Any

from tools.features.case import Differs, Refused, case
from tools.features.client import MAX_MODEL_LEN, Client, text_of, token_ids
from tools.features.sampling import token_ids_of_prompt

_GROUP = "Prompts"
_TEXT = "The parrot said to the pirate:"
_UNICODE = "🦜🇨🇭 naïve 漢字 — Ünïcödé"  # several tokens to a character, and several characters to a sign


@case(_GROUP, "token ids instead of text")
def ids_as_prompt(c: Client) -> Any:
    """Text and its token ids are the same prompt."""
    ids = token_ids_of_prompt(c, _TEXT)
    answer = c.complete(ids)
    assert token_ids(answer) == token_ids(c.complete(_TEXT))
    return token_ids(answer)


@case(_GROUP, "several prompts in one request")
def several_prompts(c: Client) -> Any:
    """Each prompt is a request of its own in the engine."""
    prompts = [_TEXT, "One, two, three,", "def main():"]
    together = c.complete(prompts)
    assert token_ids(together) == [token_ids(c.complete(p))[0] for p in prompts]
    return token_ids(together)


@case(_GROUP, "several prompts: outcome in the response")
def outcome_of_several_prompts(c: Client) -> Any:
    """vLLM's response has one place for it."""
    answer = c.complete([_TEXT, "One, two, three, four"], max_tokens=4)
    if not c.routed:
        return None
    ids = token_ids_of_prompt(c, _TEXT)
    assert answer["kv_transfer_params"]["buddy"]["tokens"] == len(ids) + len(token_ids(answer)[0]) - 1
    return Differs(
        "the response tells the outcome of the first prompt, because vLLM's has one place; metrics count all"
    )


@case(_GROUP, "a prompt of one token, and max_tokens 1")
def one_token(c: Client) -> Any:
    """There is a single position, and no decode step at all."""
    one = c.complete([42])
    single = c.complete([42], max_tokens=1)
    assert (len(token_ids(single)[0]), single["choices"][0]["finish_reason"]) == (1, "length")
    assert token_ids(single)[0] == token_ids(one)[0][:1]
    return token_ids(one)


@case(_GROUP, "an empty prompt")
def empty_prompt(c: Client) -> Any:
    """There is nothing to route by; vLLM refuses it too."""
    told = [c.refusal(prompt=""), c.refusal(prompt=[])]
    assert all("empty" in message or "prompt" in message for message in told), told
    return Refused("HTTP 400, as by stock vLLM")


@case(_GROUP, "a prompt that fills max_model_len")
def longest_prompt(c: Client) -> Any:
    """All but one position, all of them, and one more."""
    ids = (token_ids_of_prompt(c, _TEXT) * MAX_MODEL_LEN)[:MAX_MODEL_LEN]
    longest = c.complete(ids[:-1], max_tokens=1)
    assert len(token_ids(longest)[0]) == 1
    for prompt in (ids, [*ids, 1]):
        assert c.refusal(prompt=prompt, max_tokens=1)
    to_the_end = c.complete(ids[:-4], max_tokens=4, ignore_eos=True)
    assert len(token_ids(to_the_end)[0]) == 4
    return token_ids(to_the_end)


@case(_GROUP, "a prompt that is longer than a step (chunked prefill)")
def chunked_prompt(c: Client) -> Any:
    """The same alone, beside others, and after others."""
    prompt = "Chunk after chunk the wall was taken down. " * 30
    long = partial(c.complete, prompt)
    alone = token_ids(long())
    others = [partial(c.at(b).complete, f"{i}. {prompt}") for i, b in enumerate((1.0, 0.75, 0.5))]
    assert token_ids(c.at_once(*others, long)[-1]) == alone
    return alone


@case(_GROUP, "prefix caching")
def prefix_caching(c: Client) -> Any:
    """A prompt that is cached at this budget is found, and changes nothing."""
    prompt = f"Prefix of the budget {c.budget}: " + "words that many requests share. " * 30
    first = c.complete(prompt)
    again = c.complete(prompt)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert token_ids(again) == token_ids(first)


@case(_GROUP, "cache_salt")
def cache_salt(c: Client) -> Any:
    """Users with other salts do not find each other's prompts."""
    prompt = f"Salted at the budget {c.budget}: " + "words that nobody may find. " * 30

    def cached(salt: str) -> tuple[int, Any]:
        answer = c.complete(prompt, cache_salt=salt)
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"], token_ids(answer)

    first, again, other = cached("alice"), cached("alice"), cached("bob")
    assert (first[0], other[0]) == (0, 0)
    assert again[0] > 0
    assert first[1] == again[1] == other[1]


@case(_GROUP, "token ids at the edge of the vocabulary")
def edge_of_the_vocabulary(c: Client) -> Any:
    """The last id is served, the next ones are refused before they reach a table."""
    last = c.complete([1, c.vocab_size - 1, 0])
    for token_id in (c.vocab_size, c.vocab_size + 63, 2**31, -1):
        assert c.refusal(prompt=[1, token_id])
    return token_ids(last)


@case(_GROUP, "Unicode that splits tokens")
def unicode(c: Client) -> Any:
    """A character of several tokens comes whole, streamed or not."""
    body: dict[str, Any] = {"structured_outputs": {"choice": [_UNICODE]}, "max_tokens": 64}
    answer = c.complete(_UNICODE, **body)
    assert text_of(answer) == _UNICODE
    pieces = [chunk["choices"][0]["text"] for chunk in c.stream("/v1/completions", prompt=_UNICODE, **body)]
    assert "".join(pieces) == _UNICODE
    assert len(pieces) > 1
    stopped = c.complete("x", stop=["漢"], tells=False, **body)
    assert text_of(stopped) == _UNICODE[: _UNICODE.index("漢")]
    return token_ids(answer)


@case(_GROUP, "truncate_prompt_tokens, add_special_tokens, tokenize")
def tokenizer_options(c: Client) -> Any:
    """The prompt that is routed is the one that is left."""
    ids = token_ids_of_prompt(c, _TEXT)
    cut = c.complete(_TEXT, truncate_prompt_tokens=3)
    assert cut["choices"][0]["prompt_token_ids"] == ids[-3:]
    assert token_ids(cut) == token_ids(c.complete(ids[-3:]))
    status, answer = c.post("/detokenize", {"model": "model", "tokens": ids})
    assert (status, answer["prompt"]) == (200, _TEXT)
    return token_ids(c.complete(_TEXT, add_special_tokens=False))


@case(_GROUP, "prompt embeddings")
def prompt_embeddings(c: Client) -> Any:
    """The router reads token ids."""
    message = c.refusal(prompt_embeds="AAAA")
    assert "prompt" in message
    return Refused("the router reads token ids; stock vLLM needs --enable-prompt-embeds, with which we refuse to start")
