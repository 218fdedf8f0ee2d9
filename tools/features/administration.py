"""Cases: what an operator does to a server that runs."""

import json
import threading
import time
from functools import partial
from typing import Any

from tools.features.case import Refused, case
from tools.features.client import Client, token_ids

_GROUP = "Administration"
_TEXT = "In the beginning there was"
_RESETS = 5


@case(_GROUP, "reset_prefix_cache under load")
def reset_under_load(c: Client) -> Any:
    """With running requests, which are computed again: their tokens stay the same. A cached prompt is forgotten."""
    ask = partial(c.complete, _TEXT, max_tokens=40, ignore_eos=True)
    expected = token_ids(ask())

    def cached() -> int:
        answer = c.complete(f"Reset at the budget {c.budget}: " + "words that are forgotten. " * 30)
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    cached()
    assert cached() > 0
    done = threading.Event()

    def reset() -> None:
        try:
            for _ in range(_RESETS):
                assert c.post("/reset_prefix_cache?reset_running_requests=true")[0] == 200
                time.sleep(0.05)
        finally:
            done.set()

    def ask_all() -> list[Any]:
        answers: list[Any] = []
        while not done.is_set():
            answers += c.at_once(*[ask] * 4)
        return answers

    answers, _ = c.at_once(ask_all, reset)
    assert answers
    assert all(token_ids(answer) == expected for answer in answers)
    assert cached() == 0
    c.wait_idle()
    return expected


@case(_GROUP, "pause and resume: keep")
def pause_and_keep(c: Client) -> Any:
    """A frozen request goes on as if nothing had been."""
    expected = token_ids(c.complete(_TEXT, max_tokens=40, ignore_eos=True))
    body: dict[str, Any] = {"prompt": _TEXT, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
    chunks = c.stream("/v1/completions", **body)
    first = next(chunks)
    assert c.post("/pause?mode=keep")[0] == 200
    assert json.loads(c.get("/is_paused")[1])["is_paused"]
    time.sleep(0.2)
    assert c.post("/resume")[0] == 200
    rest = [chunk for chunk in (first, *chunks) if chunk["choices"]]
    assert [t for chunk in rest for t in chunk["choices"][0]["token_ids"]] == expected[0]
    return expected


@case(_GROUP, "pause and resume: abort, wait", slow=True)
def pause_and_abort(c: Client) -> Any:
    """Running requests end, and the next ones are served."""
    for mode in ("abort", "wait"):
        chunks = c.stream("/v1/completions", prompt=_TEXT, max_tokens=60, ignore_eos=True)
        next(chunks)
        try:
            assert c.post(f"/pause?mode={mode}")[0] == 200
            ended = len(list(chunks))
            assert ended >= (59 if mode == "wait" else 0)
        finally:
            assert c.post("/resume")[0] == 200
        c.complete(_TEXT)
    c.wait_idle()


@case(_GROUP, "sleep and wake up, level 1")
def sleep(c: Client) -> Any:
    """The same tokens before and after."""
    before = token_ids(c.complete(_TEXT))
    assert c.post("/sleep?level=1")[0] == 200
    assert json.loads(c.get("/is_sleeping")[1])["is_sleeping"]
    assert c.post("/wake_up")[0] == 200
    assert token_ids(c.complete(_TEXT)) == before
    return before


@case(_GROUP, "weights loaded again (reload_weights)")
def reload_weights(c: Client) -> Any:
    """What is compiled belongs to the weights loaded at start."""
    before = token_ids(c.complete(_TEXT))
    status, answer = c.post("/collective_rpc", {"method": "reload_weights"})
    assert token_ids(c.complete(_TEXT)) == before  # the engine is alive, and has the weights it had
    if not c.routed:
        return None
    assert status >= 400, answer
    return Refused("compiled layers and the bypass belong to the weights loaded at start; the server goes on with them")


@case(_GROUP, "health, models, version, load, metrics")
def plain_pages(c: Client) -> Any:
    """What monitors read. No metric holds text of a request."""
    secret = "a very secret prompt"
    c.complete(secret)
    for path in ("/health", "/v1/models", "/version", "/load", "/metrics"):
        status, text = c.get(path)
        assert status == 200, path
        assert "secret" not in text
    if c.routed:
        assert "vllm_buddy:budget_bucket" in c.get("/metrics")[1]


@case(_GROUP, "weight transfer")
def weight_transfer(c: Client) -> Any:
    """Refused at start with its setting; without it, there is nothing to transfer to."""
    status, _ = c.post("/update_weights", {"update_info": {}})
    assert status >= 400
    c.complete(_TEXT)
    return Refused("refused at start with --weight-transfer-config")
