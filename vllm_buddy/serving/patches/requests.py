"""Patches on the way of a request to the engine: what it may ask for, and which replica runs it."""

import inspect
from collections.abc import Callable
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core_client import DPLBAsyncMPClient
from vllm.v1.engine.input_processor import InputProcessor

from vllm_buddy.serving.admission.options import verify_options, verify_request, verify_tokenized
from vllm_buddy.serving.admission.replicas import ReplicaChooser
from vllm_buddy.serving.patches.wrapping import is_buddy, is_routed, wrap


def wrap_verify() -> None:
    """Validate a request's buddy options where vLLM validates its own: HTTP 400 in the server.

    Why: vLLM does not know the options in `vllm_xargs`, and only an error raised here becomes HTTP 400.
    Nearest hook: `SamplingParams._verify_extra_args`, which checks the range of integers only.
    Remove when: plugins can register a validator of `extra_args`.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def verify(self: SamplingParams, model_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, model_config, *args, **kwargs)
            if is_buddy(model_config):
                verify_options(self.extra_args, model_config)

        return verify

    wrap(SamplingParams, "verify", around)


def wrap_process_inputs() -> None:
    """Validate what depends on the prompt, where vLLM has tokenized it and the request has not left for the engine.

    These are the token ids and some of the options.

    Why, nearest hook: as in wrap_verify; `SamplingParams.verify` does not get the prompt.
    Remove when: that validator gets the tokenized prompt.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
            request = original(self, *args, **kwargs)
            params = request.sampling_params
            if is_routed(self) and isinstance(params, SamplingParams):
                verify_tokenized(
                    request.prompt_token_ids, params, self.model_config, is_streaming_input=request.resumable
                )
            return request

        return process_inputs

    wrap(InputProcessor, "process_inputs", around)


def wrap_generate(owner: type, method: str, prompt: str) -> None:
    """Refuse a request that cannot be served when its answer is asked for, not when the first part of it is.

    owner, method: one of vLLM's asynchronous generators of answers. prompt: its parameter with the prompt.

    Why: vLLM verifies a request where the generator first runs, and the answer of a streamed request has begun by then:
    with HTTP 200. In the Responses API, a stream then breaks off, and one in the background waits for ever.
    Nearest hook: as in wrap_verify.
    Remove when: vLLM verifies before it answers.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            if is_routed(self):
                given = signature.bind(self, *args, **kwargs).arguments
                verify_request(given[prompt], given["sampling_params"], self.model_config)
            return original(self, *args, **kwargs)

        return generate

    wrap(owner, method, around)


def wrap_get_core_engine_for_request() -> None:
    """Choose a replica by budget and load, where vLLM chooses one by load and the request names none.

    Why: batches of like budgets are faster, and vLLM's balancer looks at load alone.
    Nearest hook: the header `X-data-parallel-rank`, which a client would have to send without knowing the load.
    Remove when: the balancer is a class that can be named.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_core_engine_for_request(self: DPLBAsyncMPClient, request: Any) -> Any:
            is_ours = is_routed(self.vllm_config)
            if is_ours and request.data_parallel_rank is None and request.request_id not in self.reqs_in_flight:
                chooser = self.__dict__.get("buddy_replicas")
                if chooser is None:
                    chooser = self.buddy_replicas = ReplicaChooser(self.vllm_config, self.eng_start_index)
                request.data_parallel_rank = chooser.rank(self, request)
            return original(self, request)

        return get_core_engine_for_request

    wrap(DPLBAsyncMPClient, "get_core_engine_for_request", around)
