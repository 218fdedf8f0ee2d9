"""Cases: what an answer can be: structured, a call of a tool, streamed, through each of vLLM's interfaces."""

import json
import re
from typing import Any

from tools.features.case import Differs, case
from tools.features.client import MODEL, Client, text_of, token_ids

_GROUP = "Answers"
_SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "count": {"enum": [1, 2, 3]},
        "sure": {"type": "boolean"},
    },
    "required": ["colour", "count", "sure"],
    "additionalProperties": False,
}
_GRAMMAR = 'root ::= ("yes" | "no") (", " ("yes" | "no")){2} "."'
_TOOL = {
    "type": "function",
    "function": {"name": "paint", "description": "Paint the wall.", "parameters": _SCHEMA, "strict": True},
}


@case(_GROUP, "structured output: JSON schema")
def json_schema(c: Client) -> Any:
    """The grammar masks logits; each forced token is routed."""
    wanted = {"type": "json_schema", "json_schema": {"name": "wall", "schema": _SCHEMA}}
    answer = c.chat("Paint the wall.", response_format=wanted, max_tokens=64)
    _check_arguments(text_of(answer))
    again = c.complete("Paint:", structured_outputs={"json": _SCHEMA}, max_tokens=64)
    _check_arguments(text_of(again))
    return text_of(answer), text_of(again)


@case(_GROUP, "structured output: regex, choice, grammar")
def other_structures(c: Client) -> Any:
    """Each in a request of its own, and all at once."""
    asked: list[dict[str, Any]] = [
        {"regex": r"[0-9]{3}-[0-9]{4}"},
        {"choice": ["apple", "pear"]},
        {"grammar": _GRAMMAR},
    ]
    found = [text_of(c.complete("Say:", structured_outputs=s, max_tokens=48)) for s in asked]
    assert re.fullmatch(r"[0-9]{3}-[0-9]{4}", found[0])
    assert found[1] in ("apple", "pear")
    assert re.fullmatch(r"(yes|no)(, (yes|no)){2}\.", found[2])
    at_once = c.at_once(*(lambda s=s: c.complete("Say:", structured_outputs=s, max_tokens=48) for s in asked))
    assert [text_of(answer) for answer in at_once] == found
    return found


@case(_GROUP, "structured output that is not valid")
def bad_structure(c: Client) -> Any:
    """A grammar that cannot be read is the client's error, and others go on."""
    assert c.refusal(prompt="Say:", structured_outputs={"regex": "[a-"})
    assert c.refusal(prompt="Say:", structured_outputs={"grammar": "root ::= nothing"})
    c.complete("Say:")


# A random model never ends the whitespace that vLLM allows within a call.
@case(_GROUP, "tool calls: named, required, auto, streamed", slow=True)
def tool_calls(c: Client) -> Any:
    """A call is made of structured output, or read from the text of the answer."""
    named = {"type": "function", "function": {"name": "paint"}}
    found = []
    for choice in (named, "required"):
        answer = c.chat("Paint it.", tools=[_TOOL], tool_choice=choice, max_tokens=200)
        (call,) = answer["choices"][0]["message"]["tool_calls"][:1]
        assert call["function"]["name"] == "paint"
        found.append(_check_arguments(call["function"]["arguments"]))
    c.chat("Paint it.", tools=[_TOOL], tool_choice="auto")
    chunks = c.stream(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "Paint it."}],
        tools=[_TOOL],
        tool_choice=named,
        max_tokens=200,
    )
    deltas = [call for chunk in chunks for choice in chunk["choices"] for call in choice["delta"].get("tool_calls", ())]
    assert _check_arguments("".join(d["function"].get("arguments") or "" for d in deltas)) == found[0]
    return found


@case(_GROUP, "arguments of the chat template")
def chat_template(c: Client) -> Any:
    """They change the prompt, and with it what is routed."""
    asked = c.chat()["usage"]["prompt_tokens"]
    begun = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "My favourite is"}]
    continued = c.chat(messages=begun, add_generation_prompt=False, continue_final_message=True)
    assert continued["usage"]["prompt_tokens"] != asked
    plain = c.chat(add_generation_prompt=False, chat_template_kwargs={"anything": 1})
    assert plain["usage"]["prompt_tokens"] < asked
    return text_of(continued)


@case(_GROUP, "streaming, with usage")
def streaming(c: Client) -> Any:
    """What is streamed is what comes in one piece."""
    prompt = "The river was"
    whole = c.complete(prompt, max_tokens=12)
    usage = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(c.stream("/v1/completions", prompt=prompt, max_tokens=12, stream_options=usage))
    assert "".join(x["choices"][0]["text"] for x in chunks if x["choices"]) == text_of(whole)
    assert [x["usage"]["completion_tokens"] for x in chunks if x["choices"]] == sorted(
        x["usage"]["completion_tokens"] for x in chunks if x["choices"]
    )
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-1]["usage"][name] == whole["usage"][name]
    return text_of(whole)


@case(_GROUP, "streaming: outcome in the response")
def outcome_of_a_stream(c: Client) -> Any:
    """The chunk with the reason why the request finished has it, in completions and in chats."""
    chat = [{"role": "user", "content": "Name a colour."}]
    for path, body in (("/v1/completions", {"prompt": "The river was"}), ("/v1/chat/completions", {"messages": chat})):
        chunks = list(c.stream(path, max_tokens=8, **body))
        told = [chunk for chunk in chunks if "kv_transfer_params" in chunk]
        if c.routed:
            assert [bool(chunk["choices"][0]["finish_reason"]) for chunk in told] == [True]
            assert told[0]["kv_transfer_params"]["buddy"]["auto"] == (c.budget == "auto")
        else:
            assert told == []


@case(_GROUP, "streaming n > 1")
def streamed_samples(c: Client) -> Any:
    """The chunks of the samples come in any order, each with the number of its sample."""
    body: dict[str, Any] = {"prompt": "The river was", "n": 3, "seed": 5, "temperature": 1.2, "max_tokens": 10}
    whole = c.complete(**body)
    texts = ["", "", ""]
    for chunk in c.stream("/v1/completions", **body):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    return texts


@case(_GROUP, "Responses API")
def responses(c: Client) -> Any:
    """The budget goes through this interface too, and the outcome comes back, in the last event of a stream too."""
    body: dict[str, Any] = {"input": "Name a colour.", "max_output_tokens": 16}
    status, answer = c.ask("/v1/responses", **body)
    assert status == 200, answer
    assert answer["status"] in ("completed", "incomplete")
    c.check_outcome(answer)
    *_, last = c.stream("/v1/responses", **body)
    assert last["type"] == "response.completed", last
    c.check_outcome(last["response"])
    if c.routed:
        for stream in (False, True):
            status, refused = c.ask("/v1/responses", **body, stream=stream, vllm_xargs={"buddy_budget": 2})
            assert (status, "buddy_budget" in json.dumps(refused)) == (400, True), refused
    return [part["text"] for item in answer["output"] for part in item["content"]]


@case(_GROUP, "Anthropic's Messages API")
def messages(c: Client) -> Any:
    """The budget goes through this interface too, and the outcome comes back."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 8}
    status, answer = c.ask("/v1/messages", **body)
    assert status == 200, answer
    c.check_outcome(answer)
    *_, last = c.stream("/v1/messages", **body)
    assert last["type"] == "message_stop", last
    if c.routed:
        status, refused = c.ask("/v1/messages", **body, vllm_xargs={"buddy_budget": 2})
        assert (status, "buddy_budget" in json.dumps(refused)) == (400, True), refused
    return [part["text"] for part in answer["content"]]


@case(_GROUP, "several conversations in one request (/v1/chat/completions/batch)")
def batched_chat(c: Client) -> Any:
    """vLLM's request has no field for extra arguments. It passes on what it does not know, and so the budget too."""
    asked = ("Name a colour.", "Name an animal.", "Count to ten.")
    conversations = [[{"role": "user", "content": content}] for content in asked]
    status, answer = c.ask("/v1/chat/completions/batch", messages=conversations)
    assert status == 200, answer
    found = [choice["message"]["content"] for choice in answer["choices"]]
    assert found == [text_of(c.chat(content)) for content in asked]
    if not c.routed:
        return found
    options = {"vllm_xargs": {"buddy_budget": 2}}
    assert "buddy_budget" in c.refusal("/v1/chat/completions/batch", messages=conversations, **options)
    return Differs("works, but the response has no place for the outcome; metrics count each conversation")


@case(_GROUP, "generative scoring")
def generative_scoring(c: Client) -> Any:
    """vLLM makes the requests itself, without extra arguments, as for beam search."""
    asked = {"query": "Is it warm? ", "items": ["Ice.", "Fire."], "label_token_ids": [28, 216]}
    status, answer = c.ask("/generative_scoring", headers=None, **asked)
    assert status == 200, answer
    scores = [round(item["score"], 3) for item in answer["data"]]
    assert all(0.0 <= score <= 1.0 for score in scores)
    if c.routed and c.budget != 1.0:
        return Differs("runs at the server's default budget, because vLLM passes no extra arguments")
    return scores


@case(_GROUP, "token-in, token-out API (/inference/v1/generate)")
def tokens_in_tokens_out(c: Client) -> Any:
    """It takes sampling parameters and token ids as they are, past what the other interfaces do with them."""
    ids = [1, 42, 77]

    def ask(token_ids: list[int], budget: float | str | None, *, stream: bool = False) -> tuple[int, Any]:
        options = {} if budget is None else {"extra_args": {"buddy_budget": budget}}
        params = {"max_tokens": 8, "temperature": 0.0, **options}
        body = {"model": MODEL, "token_ids": token_ids, "sampling_params": params, "stream": stream}
        return c.post("/inference/v1/generate", body)

    status, answer = ask(ids, c.budget)
    assert status == 200, answer
    c.check_outcome(answer)
    found = [choice["token_ids"] for choice in answer["choices"]]
    assert found == token_ids(c.complete(ids))
    if c.routed:
        for stream in (False, True):  # a stream does not begin
            for bad in (([1, c.vocab_size], c.budget), ([1, 2**31], c.budget), (ids, 7)):
                status, refused = ask(*bad, stream=stream)
                assert status == 400, refused
        assert "vocabulary" in json.dumps(ask([1, c.vocab_size], c.budget)[1])
        assert token_ids(c.complete(ids)) == found
    return found


@case(_GROUP, "a budget that is not valid, in each interface")
def bad_budget(c: Client) -> Any:
    """HTTP 400 with the name of the parameter, also where the answer is streamed; other requests go on."""
    if not c.routed:
        return
    chat = [{"role": "user", "content": "Hello"}]
    for body in ({"prompt": "a"}, {"prompt": ["a", "b"], "n": 2, "temperature": 1.0}):
        assert "buddy_budget" in c.refusal(vllm_xargs={"buddy_budget": 7}, **body)
    for streamed in (False, True):
        wrong: dict[str, Any] = {"vllm_xargs": {"buddy_budget": "7"}, "stream": streamed}
        assert "buddy_budget" in c.refusal(prompt="a", **wrong)
        assert "buddy_budget" in c.refusal("/v1/chat/completions", messages=chat, **wrong)
        # Whether this one is right only the prompt says.
        told = c.refusal(prompt="a", stream=streamed, vllm_xargs={"buddy_context_tokens": 99})
        assert "buddy_context_tokens: 99 is not an integer from 1 to 1" in told
    assert "did you mean 'buddy_budget'?" in c.refusal(prompt="a", vllm_xargs={"buddy_buget": 0.5})
    assert len(token_ids(c.complete("a"))[0]) == 8


def _check_arguments(text: str) -> Any:
    """Return the value of the JSON text, which must fit the schema."""
    value = json.loads(text)
    assert value["colour"] in ("red", "green", "blue")
    assert value["count"] in (1, 2, 3)
    assert isinstance(value["sure"], bool)
    assert len(value) == 3
    return value
