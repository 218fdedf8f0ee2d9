"""The outcome in the chunks of a streamed answer."""

import asyncio
import inspect
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from vllm_buddy.serving.telemetry.stream import chunks_with_outcome

OUTCOME = {"buddy": {"depth": 4}}


async def results() -> AsyncIterator[Any]:
    """As from vLLM's engine: the outcome comes with the last one."""
    for number in range(3):
        yield SimpleNamespace(kv_transfer_params=OUTCOME if number == 2 else None)


async def chunks(result_generator: AsyncIterator[Any], error_at: int | None = None) -> AsyncIterator[str]:
    """As vLLM's generators: a chunk for each result, one with the usage, and the end."""
    number = 0
    async for _ in result_generator:
        if number == error_at:
            yield 'data: {"error": {"code": 500}}\n\n'
            break
        if number == 2:  # the first chunk of a chat may come with its last result
            yield 'data: {"id": "x", "choices": [{"delta": {"role": "assistant"}, "finish_reason": null}]}\n\n'
        reason = '"stop"' if number == 2 else "null"
        yield f'data: {{"id": "x", "choices": [{{"text": "{number}", "finish_reason": {reason}}}]}}\n\n'
        number += 1
    else:
        yield 'data: {"id": "x", "choices": [], "usage": {"total_tokens": 3}}\n\n'
    yield "data: [DONE]\n\n"


def streamed(*, tells_paths: bool, error_at: int | None = None) -> tuple[list[str], list[str]]:
    """(chunks as vLLM sends them, chunks with the outcome)."""

    async def both() -> tuple[list[str], list[str]]:
        call = inspect.signature(chunks).bind(results(), error_at)
        with_it = [chunk async for chunk in chunks_with_outcome(chunks, call, tells_paths=tells_paths)]
        return [chunk async for chunk in chunks(results(), error_at)], with_it

    return asyncio.run(both())


def test_the_last_chunk_with_choices_tells_the_outcome_and_no_other_changes() -> None:
    """Fails if a stream has no outcome, a client sees a chunk more than vLLM's, or another chunk is rewritten."""
    vllms, ours = streamed(tells_paths=False)
    assert len(vllms) == len(ours) == 6
    assert ours[:3] + ours[4:] == vllms[:3] + vllms[4:]
    before, after = (json.loads(s[3].removeprefix("data: ")) for s in (vllms, ours))
    assert after == {**before, "kv_transfer_params": OUTCOME}


def test_a_request_for_paths_has_chunks_of_its_own() -> None:
    """Fails if the outcome comes in two places, or after the end."""
    vllms, ours = streamed(tells_paths=True)
    added = [chunk for chunk in ours if chunk not in vllms]
    assert [json.loads(chunk.removeprefix("data: "))["kv_transfer_params"] for chunk in added] == [OUTCOME]
    assert ours[-1] == "data: [DONE]\n\n"


def test_an_error_goes_through_as_it_is() -> None:
    """Fails if an answer that breaks off hides the error from the client."""
    for error_at in (1, 2):
        vllms, ours = streamed(tells_paths=False, error_at=error_at)
        assert ours == vllms
