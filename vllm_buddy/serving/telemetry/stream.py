"""The outcome of a streamed answer: vLLM's chunks leave out the `kv_transfer_params` that whole answers have."""

import inspect
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from vllm_buddy.serving.admission.option_names import OUTCOME_KEY

_EVENT = "data: "
_DONE = "data: [DONE]\n\n"


async def chunks_with_outcome(
    original: Callable[..., AsyncIterator[str]], call: inspect.BoundArguments, *, tells_paths: bool
) -> AsyncIterator[str]:
    """vLLM's chunks, of which the one with the reason why the request finished has its outcome.

    original, call: vLLM's generator of chunks, and its arguments.
    tells_paths: each chunk is followed by one without choices that has the paths of its tokens, and the outcome is in
        the last of these.
    """
    told: list[dict[str, Any]] = []

    async def listen(results: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for result in results:
            output = result[1] if isinstance(result, tuple) else result  # completions: with the number of its prompt
            if OUTCOME_KEY in (params := output.kv_transfer_params or {}):
                told.append(params)
            yield result

    call.arguments["result_generator"] = listen(call.arguments["result_generator"])
    head: dict[str, Any] = {}
    async with aclosing(original(*call.args, **call.kwargs)) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            is_done = chunk == _DONE
            if told and not tells_paths and not is_done and _finishes(content := _parsed(chunk)):
                chunk = _chunk({**content, "kv_transfer_params": told.pop(0)})
            if tells_paths and not head and not is_done:
                head = {key: _parsed(chunk).get(key) for key in ("id", "object", "created", "model")}
            if not is_done:
                yield chunk
            if tells_paths:
                for params in told:
                    yield _chunk({**head, "choices": [], "kv_transfer_params": params})
                told.clear()
            if is_done:
                yield chunk


def _parsed(chunk: str) -> dict[str, Any]:
    return json.loads(chunk.removeprefix(_EVENT))


def _chunk(content: dict[str, Any]) -> str:
    return f"{_EVENT}{json.dumps(content)}\n\n"


def _finishes(content: dict[str, Any]) -> bool:
    return any(choice.get("finish_reason") for choice in content.get("choices", ()))
