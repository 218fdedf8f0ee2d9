"""One real server, over HTTP: budgets in, outcomes and metrics out."""

import json
import math
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from tests.harness.engine import Ask, Tiny, paths_told
from tests.harness.http_server import LOAD_PRICE, NUM_TOKENS, PROMPTS, SCHEDULE, Server, auto, budget, serving
from tests.harness.tiny_models import NUM_LAYERS, PREDICTOR_DEPTHS, PREDICTOR_PRICE
from vllm_buddy.method import budget_for_depth, depth_for_budget


@pytest.fixture(scope="module")
def server(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(lambda log: Server(tiny("llama"), log), tmp_path_factory.mktemp("server") / "log") as made:
        yield made


def test_mixed_budgets_at_once_give_the_references_tokens_and_tell_what_ran(
    server: Server, tiny: Callable[[str], Tiny]
) -> None:
    """Fails if budgets are lost between HTTP and the engine's processes, or the outcome on the way back."""
    budgets = (0.5, 1.0, 0.75, 0.4)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda pair: server.complete(pair[0], budget(str(pair[1]))), zip(PROMPTS, budgets)))
    for (status, answer), prompt, asked in zip(answers, PROMPTS, budgets, strict=True):
        expected = tiny("llama").expected(Ask(prompt, asked, NUM_TOKENS), "masked", SCHEDULE)
        assert status == 200
        assert answer["choices"][0]["token_ids"] == expected.token_ids
        depth = depth_for_budget(asked, NUM_LAYERS)
        assert answer["kv_transfer_params"]["buddy"] == {
            "mode": "budget",
            "budget": asked,
            "depth": depth,
            "auto": False,
            "price": None,
            "lowered_to": None,
            "layers_executed_mean": depth,
            "layers_executed_min": depth,
            "layers_executed_max": depth,
            "tokens": len(prompt) + NUM_TOKENS - 1,
            "prompt": {"tokens": len(prompt), "layers_executed_mean": depth},
            "decoded": {"tokens": NUM_TOKENS - 1, "layers_executed_mean": depth},
            "drafted": 0,
            "accepted": 0,
            "layers_drafting_mean": 0.0,
            "distinct_paths": len(set(expected.paths)),
            "reroutes": sum(a != b for a, b in zip(expected.paths, expected.paths[1:])),
        }


def test_a_request_that_asks_is_told_the_path_of_each_token(server: Server, tiny: Callable[[str], Tiny]) -> None:
    """Fails if paths are told to those who do not ask, or are not those that the reference runs."""
    asked = '"vllm_xargs": {"buddy_budget": 0.5, "buddy_paths": true}'
    expected = tiny("llama").expected(Ask(PROMPTS[0], 0.5, NUM_TOKENS), "masked", SCHEDULE)
    outcome = server.complete(PROMPTS[0], asked)[1]["kv_transfer_params"]["buddy"]
    assert paths_told(outcome["paths"]) == expected.paths[: len(PROMPTS[0]) + NUM_TOKENS - 1]
    assert "paths" not in server.complete(PROMPTS[0], budget("0.5"))[1]["kv_transfer_params"]["buddy"]


def test_a_stream_tells_paths_as_it_goes_and_the_outcome_at_its_end(
    server: Server, tiny: Callable[[str], Tiny]
) -> None:
    """Fails if streamed chunks lose a token's path, or come to a client that does not ask for them."""
    expected = tiny("llama").expected(Ask(PROMPTS[1], 0.5, NUM_TOKENS), "masked", SCHEDULE)
    chunks = server.stream(PROMPTS[1], '"vllm_xargs": {"buddy_budget": 0.5, "buddy_paths": true}')
    told = [chunk["kv_transfer_params"]["buddy"] for chunk in chunks if "kv_transfer_params" in chunk]
    assert all(chunk["choices"] == [] for chunk in chunks if "kv_transfer_params" in chunk)
    assert paths_told(told[-1]["paths"]) == expected.paths[: len(PROMPTS[1]) + NUM_TOKENS - 1]
    assert told[-1]["depth"] == depth_for_budget(0.5, NUM_LAYERS)
    # With the first token come those of the prompt. A client that reads slowly gets more, because vLLM merges chunks.
    first = paths_told(told[0]["paths"])
    assert len(first) >= len(PROMPTS[1])
    assert first == expected.paths[: len(first)]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_stream_tells_the_outcome_in_its_last_chunk(server: Server) -> None:
    """Fails if streaming clients do not learn what their request got, or must read a chunk that vLLM does not send."""
    *before, last = server.stream(PROMPTS[1], budget("0.5"))
    whole = server.complete(PROMPTS[1], budget("0.5"))[1]
    assert last["kv_transfer_params"] == whole["kv_transfer_params"]
    assert last["choices"][0]["finish_reason"] == "length"
    assert not any("kv_transfer_params" in chunk for chunk in before)


# As JSON text: NaN and 1e400 are not JSON by the letter, but Python's parser takes them.
BAD = ("0", "-0.5", "1.5", "NaN", "Infinity", "1e400", "[0.5]", '"half"', '"0.5"', '"Auto"', "0.3", "false", "[]")


@pytest.mark.parametrize("value", BAD)
def test_a_bad_budget_is_answered_400_while_others_go_on(server: Server, value: str) -> None:
    """Fails if a bad request gets a 500, no name of the parameter, or takes others with it."""
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(server.complete, PROMPTS[0], budget("0.5"), 40)
        status, answer = server.complete(PROMPTS[1], budget(value))
        assert good.result()[0] == 200
    assert status == 400
    assert answer["error"]["param"] == "vllm_xargs.buddy_budget"
    assert "buddy_budget" in answer["error"]["message"]
    assert ("0.375" if value == "0.3" else "(0, 1]") in answer["error"]["message"]


@pytest.mark.parametrize(
    "options", ['"buddy_budget": "half"', '"buddy_buget": 0.5', '"buddy_paths": 7', '"buddy_context_tokens": 1000']
)
def test_a_stream_does_not_begin_with_options_that_cannot_be_served(server: Server, options: str) -> None:
    """Fails if a client that streams gets HTTP 200 for a request that is refused, as for stock vLLM's options."""
    status, answer = server.complete(PROMPTS[0], f'"stream": true, "vllm_xargs": {{{options}}}', 8)
    assert status == 400
    assert answer["error"]["param"] == f"vllm_xargs.{options.split(chr(34))[1]}"


@pytest.mark.parametrize(
    ("body", "key", "told"),
    [
        (auto(buddy_price=-0.1), "buddy_price", "from 0 up"),
        (auto(buddy_price=math.nan), "buddy_price", "from 0 up"),
        (auto(buddy_price=math.inf), "buddy_price", "from 0 up"),
        (auto(buddy_price="cheap"), "buddy_price", "from 0 up"),
        (auto(buddy_auto_max=2), "buddy_auto_max", "(0, 1]"),
        (auto(buddy_auto_min=0.2), "buddy_auto_min", "0.375 to 1"),
        (auto(buddy_auto_min=0.625, buddy_auto_max=0.7), "buddy_auto_min", "among 0.4, 0.5, 0.8, 1"),
        ('"vllm_xargs": {"buddy_price": 0.1}', "buddy_price", "the budget is 1"),
    ],
)
def test_a_bad_option_of_auto_is_answered_400_while_others_go_on(
    server: Server, body: str, key: str, told: str
) -> None:
    """Fails if what cannot be chosen is found out in the engine, where it would end all requests."""
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(server.complete, PROMPTS[0], budget("0.5"), 40)
        status, answer = server.complete(PROMPTS[1], body)
        assert good.result()[0] == 200
    assert status == 400
    assert answer["error"]["param"] == f"vllm_xargs.{key}"
    assert key in answer["error"]["message"]
    assert told in answer["error"]["message"]


MOST_ASKED = 100


def test_auto_is_chosen_at_the_price_of_the_moment(server: Server, tiny: Callable[[str], Tiny]) -> None:
    """Fails if price, range or load do not reach the choice, or the response does not tell what was chosen.

    What is chosen under load is asked for until it is: that a request is running is known in the server only.
    """
    predictor = tiny("llama").artifact.predictor
    assert predictor is not None

    def told(prompt: tuple[int, ...], price: float, **options: float) -> float:
        """Ask; returns the effective price, after a look at the rest."""
        status, answer = server.complete(prompt, auto(**options))
        assert status == 200
        outcome = answer["kv_transfer_params"]["buddy"]
        allowed = [d for d in PREDICTOR_DEPTHS if d / NUM_LAYERS >= options.get("buddy_auto_min", 0)]
        depth = predictor.depth(predictor.excess(prompt), outcome["price"], allowed)
        assert (outcome["auto"], outcome["depth"]) == (True, depth)
        assert outcome["budget"] == budget_for_depth(depth, NUM_LAYERS)
        assert outcome["layers_executed_min"] == outcome["layers_executed_max"] == depth
        expected = tiny("llama").expected(Ask(prompt, outcome["budget"], NUM_TOKENS), "masked", SCHEDULE)
        assert answer["choices"][0]["token_ids"] == expected.token_ids
        assert outcome["price"] in (price, LOAD_PRICE)
        return outcome["price"]

    for prompt in PROMPTS:
        assert told(prompt, PREDICTOR_PRICE) == PREDICTOR_PRICE
    assert told(PROMPTS[0], 0.0, buddy_price=0.0) == 0.0
    assert told(PROMPTS[0], 1e6, buddy_price=1e6, buddy_auto_min=0.5) == 1e6
    enough = Event()

    def keep_running(prompt: tuple[int, ...]) -> set[int]:
        """Send a prompt again and again until it is enough; returns the depths that it ran at."""
        depths = set()
        while not enough.is_set():
            depths.add(server.complete(prompt, budget("0.5"), 440)[1]["kv_transfer_params"]["buddy"]["depth"])
        return depths

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(keep_running, prompt) for prompt in PROMPTS * 2]
        try:
            assert any(told(PROMPTS[1], PREDICTOR_PRICE) == LOAD_PRICE for _ in range(MOST_ASKED))
        finally:
            enough.set()
        assert set().union(*(request.result() for request in running)) == {4}
    assert told(PROMPTS[1], PREDICTOR_PRICE) == PREDICTOR_PRICE
    metrics = server.metrics()
    assert (metrics["vllm_buddy:load"], metrics["vllm_buddy:auto_price"]) == (0, PREDICTOR_PRICE)


def test_a_context_beyond_the_prompt_is_answered_400_while_others_go_on(server: Server) -> None:
    """Fails if what only the prompt's length can tell is found out in the engine, where it would end all requests."""
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(server.complete, PROMPTS[0], budget("0.5"), 40)
        status, answer = server.complete(PROMPTS[1], '"vllm_xargs": {"buddy_context_tokens": 1000}')
        assert good.result()[0] == 200
    assert status == 400
    assert answer["error"]["param"] == "vllm_xargs.buddy_context_tokens"
    assert f"from 1 to {len(PROMPTS[1])}" in answer["error"]["message"]


def test_a_context_reaches_the_router(server: Server, tiny: Callable[[str], Tiny]) -> None:
    """Fails if the option is checked and then dropped between HTTP and the engine."""
    for context in (1, 5):
        ask = Ask(PROMPTS[0], 0.5, NUM_TOKENS, context=context)
        body = f'"vllm_xargs": {{"buddy_budget": 0.5, "buddy_context_tokens": {context}}}'
        status, answer = server.complete(PROMPTS[0], body)
        assert status == 200
        assert answer["choices"][0]["token_ids"] == tiny("llama").expected(ask, "masked", SCHEDULE).token_ids


def test_an_object_as_budget_is_answered_400(server: Server) -> None:
    """Fails if what vLLM's own schema refuses becomes a 500."""
    assert server.complete(PROMPTS[0], budget('{"x": 1}'))[0] == 400


def test_an_unknown_option_is_answered_400_by_name(server: Server) -> None:
    """Fails if a misspelt option is passed over."""
    status, answer = server.complete(PROMPTS[0], '"vllm_xargs": {"buddy_bugdet": 0.5}')
    assert status == 400
    assert answer["error"]["param"] == "vllm_xargs.buddy_bugdet"


@pytest.mark.parametrize("body", ["", budget("1"), budget("true")], ids=("none", "1", "true"))
def test_no_budget_one_and_true_are_the_whole_model(server: Server, body: str) -> None:
    """Fails if the default is not applied. vLLM turns JSON true into 1 before anyone sees it, which is documented."""
    status, answer = server.complete(PROMPTS[0], body)
    assert status == 200
    assert answer["kv_transfer_params"]["buddy"]["depth"] == NUM_LAYERS


def test_metrics_count_what_was_served(server: Server) -> None:
    """Fails if a family is missing, or counts something else than the requests between two scrapes."""
    server.complete(PROMPTS[0], budget("1.0"), 2)
    before = server.metrics()
    asked = ((PROMPTS[0], 0.5), (PROMPTS[1], 0.75), (PROMPTS[2], 1.0))
    outcomes = [server.complete(p, budget(str(b)))[1]["kv_transfer_params"]["buddy"] for p, b in asked]
    outcomes.append(server.complete(PROMPTS[3], auto())[1]["kv_transfer_params"]["buddy"])
    after = server.metrics()
    grown = {name.removeprefix("vllm_buddy:"): after[name] - before[name] for name in after}
    assert grown["budget_count"] == grown["layers_executed_count"] == 4
    assert grown["budget_sum"] == pytest.approx(0.5 + 0.75 + 1.0 + outcomes[3]["budget"])  # a difference of sums
    assert grown["auto_budget_count"] == 1
    assert grown["auto_budget_sum"] == pytest.approx(outcomes[3]["budget"])
    assert grown["layers_executed_sum"] == sum(o["depth"] for o in outcomes)
    assert grown["layer_tokens_executed_total"] == sum(o["depth"] * o["tokens"] for o in outcomes)
    assert grown["layer_tokens_skipped_total"] == sum((NUM_LAYERS - o["depth"]) * o["tokens"] for o in outcomes)
    assert grown["reroutes_total"] == sum(o["reroutes"] for o in outcomes)
    assert grown["decisions_total"] > 0
    # One request at a time, so a step runs the layers of its path, prompts in one step.
    assert grown["step_layers_count"] == 4 * NUM_TOKENS
    assert grown["step_layers_sum"] == sum(o["depth"] * NUM_TOKENS for o in outcomes)
    assert grown["routing_seconds_count"] > 0
    assert 0 < grown["routing_seconds_sum"] < 1


def test_an_abandoned_request_leaves_the_server_whole(server: Server) -> None:
    """Fails if a client that goes away leaves a route behind that the next step trips over."""
    host, port = server.url.removeprefix("http://").split(":")
    asked = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 400, "stream": True}
    body = json.dumps({**asked, "vllm_xargs": {"buddy_budget": 0.5}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    for _ in range(3):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            assert b"200 OK" in connection.recv(100)
    assert server.complete(PROMPTS[1], budget("0.75"))[0] == 200
