"""The paths that a request asks for, where vLLM makes one output of several steps."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FinishReason
from vllm.v1.engine.output_processor import RequestOutputCollector, RequestState

from tests.harness.engine import paths_told
from vllm_buddy.serving import patches
from vllm_buddy.serving.schedule.outcome import described, is_outcome

STEPS = ([0b1011, 0b1011], [0b1101], [0b1011], [0b1111])  # paths of the tokens that each step tells
ALL = [path for paths in STEPS for path in paths]
OUTCOME = {"buddy": {"mode": "budget", "paths": {}}}


@pytest.fixture(autouse=True)
def patched() -> None:
    patches.apply()


def told(paths: list[int]) -> dict[str, Any]:
    """The kv_transfer_params of an output whose step told these paths."""
    return {"buddy": {"paths": described([SimpleNamespace(num_tokens=1, path=p) for p in paths], 4)}}


def output(params: Any, sample: int = 0) -> RequestOutput:
    completion = CompletionOutput(sample, "x", [1], None, None)
    return RequestOutput("r", None, [1], None, [completion], False, kv_transfer_params=params)


def collected(*outputs: RequestOutput) -> Any:
    """What a client gets that reads after all of them have come."""
    collector = RequestOutputCollector(RequestOutputKind.DELTA, "r")
    for one in outputs:
        collector.put(one)
    got: Any = collector.get_nowait()
    return got.kv_transfer_params


def test_a_slow_client_is_told_the_paths_of_all_tokens() -> None:
    """Fails if paths are lost where tokens come faster than they are read: those of the rest stand at wrong places."""
    got = collected(*(output(told(paths)) for paths in STEPS))
    assert paths_told(got["buddy"]["paths"]) == ALL
    assert collected(output(told(STEPS[0])), output(OUTCOME)) == OUTCOME  # which has all paths
    assert collected(output(None), output({"other": 1})) == {"other": 1}


def test_a_slow_client_is_told_the_outcome_of_a_sample_while_another_goes_on() -> None:
    """Fails if the output of a sample that goes on takes away the outcome of one that has ended."""
    assert collected(output(OUTCOME, 0), output(None, 1)) == OUTCOME
    assert collected(output(told(STEPS[0]), 0), output(told(STEPS[1]), 1)) == told(STEPS[1])


def state(kind: RequestOutputKind, stream_interval: int = 1) -> tuple[RequestState, list[int]]:
    """A request of vLLM's front end, and its token ids so far."""
    token_ids: list[int] = []
    detokenizer: Any = SimpleNamespace(
        get_next_output_text=lambda *_: "", num_output_tokens=lambda: len(token_ids), output_token_ids=token_ids
    )
    logprobs: Any = SimpleNamespace(
        logprobs=None,
        cumulative_logprob=None,
        prompt_logprobs=None,
        prompt_token_id_logprobs=None,
        pop_prompt_logprobs=lambda: None,
        pop_prompt_token_id_logprobs=lambda: None,
    )
    request = RequestState(
        "r", "r", None, 0, None, kind, None, [1], None, logprobs, detokenizer, 8, 0.0, None, False, stream_interval
    )
    return request, token_ids


def test_tokens_that_are_streamed_together_tell_all_their_paths() -> None:
    """Fails if --stream-interval leaves out the paths of the steps that it leaves out."""
    request, token_ids = state(RequestOutputKind.DELTA, stream_interval=3)
    seen = []
    for paths in STEPS:
        token_ids.append(1)
        one: Any = request.make_request_output([1], None, None, None, told(paths))
        if one is not None:
            seen += paths_told(one.kv_transfer_params["buddy"]["paths"])
    assert seen == ALL


def test_an_answer_that_a_stop_string_ends_does_not_tell_the_paths_of_its_last_step() -> None:
    """Fails if a whole response passes off the paths of a few tokens as those of all."""
    request, token_ids = state(RequestOutputKind.FINAL_ONLY)
    for paths in STEPS:
        token_ids.append(1)
        finish = FinishReason.STOP if paths is STEPS[-1] else None
        one: Any = request.make_request_output([1], None, finish, "stop", told(paths))
    assert one.finished
    assert not is_outcome(one.kv_transfer_params)
    assert one.kv_transfer_params is None
