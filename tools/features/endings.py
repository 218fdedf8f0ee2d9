"""Cases: requests that do not go their whole way."""

import time
from functools import partial
from typing import Any

from tools.features.case import case
from tools.features.client import MAX_MODEL_LEN, MAX_NUM_SEQS, Client, token_ids

_GROUP = "Requests that end otherwise"
_LONG = "Line by line the ship went under. " * 50
_TEXT = "Somebody knocked at the door, and"


@case(_GROUP, "the same request id twice at once")
def duplicate_ids(c: Client) -> Any:
    """vLLM tells requests apart itself, so both are served."""
    ask = partial(c.ask, "/v1/completions", {"X-Request-Id": "twice"}, prompt=_TEXT, return_token_ids=True)
    answers = c.at_once(*[ask] * 4)
    assert [status for status, _ in answers] == [200] * 4
    assert len({tuple(token_ids(answer)[0]) for _, answer in answers}) == 1
    return token_ids(answers[0][1])


@case(_GROUP, "clients that vanish in prefill")
def vanish_in_prefill(c: Client) -> Any:
    """Nothing is left of them, and others are not disturbed."""
    expected = token_ids(c.complete(_TEXT))
    for number in range(6):
        with c.connection() as connection:
            body = c._body({"prompt": f"{number} {_LONG}", "max_tokens": 60})
            connection.connect()
            _send(connection, body)
    assert token_ids(c.complete(_TEXT)) == expected
    c.wait_idle()


@case(_GROUP, "clients that vanish in decode")
def vanish_in_decode(c: Client) -> Any:
    """Their blocks are free again, and others are not disturbed."""
    expected = token_ids(c.complete(_TEXT))

    def read_two(number: int) -> None:
        chunks = c.stream("/v1/completions", prompt=f"{number} {_TEXT}", max_tokens=300, ignore_eos=True)
        next(chunks)
        next(chunks)
        chunks.close()  # type: ignore[attr-defined]

    *_, beside = c.at_once(*[partial(read_two, i) for i in range(4)], partial(c.complete, _TEXT))
    assert token_ids(beside) == expected
    c.wait_idle()


@case(_GROUP, "clients that vanish with n > 1")
def vanish_with_samples(c: Client) -> Any:
    """All samples end with their client."""
    chunks = c.stream("/v1/completions", prompt=_TEXT, max_tokens=300, n=4, temperature=1.0, ignore_eos=True)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    c.wait_idle()


@case(_GROUP, "clients that vanish while preempted")
def vanish_while_preempted(c: Client) -> Any:
    """A preempted request holds no blocks, but it has a route."""
    chunks = [c.stream("/v1/completions", prompt=_TEXT, max_tokens=200, ignore_eos=True) for _ in range(3)]
    for stream in chunks:
        next(stream)
    c.post("/reset_prefix_cache?reset_running_requests=true")
    for stream in chunks:
        stream.close()  # type: ignore[attr-defined]
    c.wait_idle()


@case(_GROUP, "slow readers", slow=True)
def slow_readers(c: Client) -> Any:
    """A client that does not read holds up nobody."""
    slow = c.stream("/v1/completions", prompt=_TEXT, max_tokens=MAX_MODEL_LEN - 50, ignore_eos=True)
    next(slow)
    started = time.monotonic()
    c.complete(_TEXT)
    assert time.monotonic() - started < 60
    assert sum(1 for _ in slow) > 10
    c.wait_idle()


@case(_GROUP, "aborted by the server (/abort_requests)")
def aborted_by_the_server(c: Client) -> Any:
    """The client gets an answer that says so."""
    # More than run at once: where steps are as short as a tiny model's, vLLM may send a client its first tokens late,
    # after the first requests have ended.
    prompts = [_TEXT] * 3 * MAX_NUM_SEQS
    chunks = c.stream("/v1/completions", prompt=prompts, max_tokens=MAX_MODEL_LEN - 50, ignore_eos=True)
    next(chunks)
    status, answer = c.post("/abort_requests")
    assert (status, answer["status"]) == (200, "aborted"), answer
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert set(reasons) <= {None, "abort", "length"}
    assert reasons.count("length") < len(prompts)  # vLLM says nothing of those that had not begun
    c.wait_idle()


def _send(connection: Any, body: dict[str, Any]) -> None:
    import json

    connection.request("POST", "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
