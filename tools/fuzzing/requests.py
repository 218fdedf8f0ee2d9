"""Sends random requests to a server that runs, and checks that it answers each and stays what it was."""

import json
from collections import Counter
from typing import Any

import psutil
from hypothesis import given
from hypothesis import strategies as st

from tools.features.client import Client, token_ids
from tools.fuzzing.options import drawn, options

_CANARY = "The canary sang"
_CANARY_EVERY = 25
_MOST_GROWTH_BYTES = 300 << 20  # of all processes of a server, over thousands of requests

_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)  # lone surrogates: HTTP 500 of stock vLLM too
_prompts = st.one_of(
    _texts,
    st.lists(st.integers(0, 49151), max_size=40),
    st.lists(_texts, max_size=3),
    st.lists(st.integers(), max_size=3),
    st.none(),
)
_chunked = st.just("The canary sang as long as the water rose in the deep shaft. " * 12)  # more than a step takes
_optional: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(0, 3),
    "temperature": st.floats(-0.5, 3),
    "seed": st.integers(),
    "top_p": st.floats(-0.1, 1.1),
    "logprobs": st.integers(-1, 6),
    "prompt_logprobs": st.integers(-1, 3),
    "echo": st.booleans(),
    "stream": st.booleans(),
    "stop": st.lists(_texts, max_size=2),
    "min_tokens": st.integers(-1, 5),
    "ignore_eos": st.booleans(),
    "cache_salt": _texts,
    "priority": st.integers(-3, 3),
    "structured_outputs": st.sampled_from(({"regex": "[ab]{3}"}, {"choice": ["a"]}, {"regex": "("}, {})),
    "logit_bias": st.dictionaries(st.sampled_from(("1", "49151", "49152", "x")), st.floats(-200, 200), max_size=2),
}
# Most parts are right: one that is wrong hides the others.
_xargs = st.one_of(st.just({}), st.fixed_dictionaries({"buddy_budget": st.floats(0.5, 1.0) | st.just("auto")}), options)
_others = st.lists(st.sampled_from(list(_optional)), max_size=2, unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: _optional[key] for key in keys})
)
_bodies = st.builds(
    lambda prompt, max_tokens, xargs, others: {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "vllm_xargs": xargs,
        **others,
    },
    st.just("The canary") | _texts | _prompts | _chunked,
    st.integers(1, 6) | st.integers(-1, 6),
    _xargs,
    _others,
)


def fuzz(client: Client, num_cases: int) -> Counter[int]:
    """Send `num_cases` random requests; returns how often each HTTP status came.

    Raises:
        AssertionError: an answer is neither HTTP 200 nor 400, or another request is not answered as before.
    """
    statuses: Counter[int] = Counter()
    expected = token_ids(client.complete(_CANARY))

    def run(body: dict[str, Any]) -> None:
        try:
            text = json.dumps({"model": "model", **body})
        except ValueError:  # integers that Python does not print
            return
        status, answer = client.post("/v1/completions", text.encode())
        assert status in (200, 400), (status, text, answer)
        statuses[status] += 1
        if statuses.total() % _CANARY_EVERY == 0:
            assert token_ids(client.complete(_CANARY)) == expected

    drawn(given(_bodies)(run), num_cases)()
    assert token_ids(client.complete(_CANARY)) == expected
    client.wait_idle()
    return statuses


def flood(client: Client, num_requests: int, server_pid: int, at_once: int = 16) -> tuple[int, int]:
    """Send requests with a cache salt and a budget of their own each; returns (metric lines, growth in bytes).

    Raises:
        AssertionError: metrics have more lines than before, or the server's processes have grown.
    """

    def ask(number: int) -> Any:
        budget = 0.5 + 0.5 * (number + 1) / num_requests
        return client.at(budget).complete(f"Request {number}", max_tokens=1, cache_salt=f"salt {number}")

    for number in range(at_once):
        ask(number)
    client.wait_idle()
    lines, memory = _num_metric_lines(client), _resident_bytes(server_pid)
    for start in range(0, num_requests, at_once):
        client.at_once(*[lambda n=n: ask(n) for n in range(start, min(start + at_once, num_requests))])
    client.wait_idle()
    growth = _resident_bytes(server_pid) - memory
    assert _num_metric_lines(client) == lines
    assert growth < _MOST_GROWTH_BYTES, growth
    return lines, growth


def _num_metric_lines(client: Client) -> int:
    return sum(line.startswith("vllm_buddy:") for line in client.get("/metrics")[1].splitlines())


def _resident_bytes(pid: int) -> int:
    process = psutil.Process(pid)
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
