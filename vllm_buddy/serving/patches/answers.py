"""Patches on the way of an answer to the client: it says what the request ran."""

import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from vllm_buddy.serving.admission.option_names import OUTCOME_KEY
from vllm_buddy.serving.admission.options import wants_paths
from vllm_buddy.serving.patches.wrapping import is_routed, wrap
from vllm_buddy.serving.schedule.outcome import is_outcome, joined, with_samples
from vllm_buddy.serving.telemetry.stream import chunks_with_outcome


def wrap_make_request_output() -> None:
    """Tell the outcome of each sample, and all paths, where vLLM makes one output of several.

    Why: each sample (n > 1) is a request of its own in the engine, and vLLM passes on the parameters of the one that
    ends last; of steps that it streams together, those of the last step.
    Nearest hook: none; `RequestOutput` has one `kv_transfer_params` for all its outputs.
    Remove when: `CompletionOutput` has parameters of its own.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def make_request_output(self: RequestState, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            # The fifth argument; only our scheduler puts an outcome there.
            told = kwargs.get("kv_transfer_params", args[4] if len(args) > 4 else None)
            if self.output_kind != RequestOutputKind.FINAL_ONLY:
                told = joined(self.__dict__.pop("buddy_untold", None), told)
                if output is None:  # with --stream-interval
                    self.__dict__["buddy_untold"] = told
                elif told and OUTCOME_KEY in told:
                    output.kv_transfer_params = told
            elif output is not None and told and OUTCOME_KEY in told and not is_outcome(told):
                # It ended with a stop string. The paths of its last step are not those of the answer.
                output.kv_transfer_params = {key: value for key, value in told.items() if key != OUTCOME_KEY} or None
            parent = self.parent_req
            if parent is None:
                return output
            samples: dict[int, Any] = parent.__dict__.setdefault("buddy_samples", {})
            if told and is_outcome(told):
                samples[self.request_index] = told[OUTCOME_KEY]
            if samples and output is not None and output.finished:
                output.kv_transfer_params = with_samples(output.kv_transfer_params, samples, parent.n)
            return output

        return make_request_output

    wrap(RequestState, "make_request_output", around)


def wrap_add_outputs() -> None:
    """Keep the paths of both, where vLLM adds an output to one that the client has not read yet.

    Why: of such outputs, vLLM keeps the parameters of the last one.
    Nearest hook, remove when: as in wrap_make_request_output.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def add(self: RequestOutput, next_output: RequestOutput, *args: Any, **kwargs: Any) -> None:
            before = self.kv_transfer_params
            same = [output.index for output in self.outputs] == [output.index for output in next_output.outputs]
            original(self, next_output, *args, **kwargs)
            told: Any = joined(before, self.kv_transfer_params, same_sample=same)
            self.kv_transfer_params = told

        return add

    wrap(RequestOutput, "add", around)


def wrap_stream(serving: type, method: str) -> None:
    """Stream the outcome of a request in its last chunk, and its paths, if it asks for them, in chunks of their own.

    serving: OpenAIServingChat or OpenAIServingCompletion. method: its generator of chunks.

    Why: vLLM's streamed chunks leave out the `kv_transfer_params` that its whole responses have.
    Nearest hook: `--middleware`, which would have to parse the answers of all requests.
    Remove when: vLLM streams `kv_transfer_params`.
    """

    def around(original: Callable[..., AsyncIterator[str]]) -> Callable[..., AsyncIterator[str]]:
        signature = inspect.signature(original)

        def stream(self: Any, request: Any, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
            if not is_routed(self):
                return original(self, request, *args, **kwargs)
            call = signature.bind(self, request, *args, **kwargs)
            # A subclass writes the chunks in another protocol: Anthropic's takes one without choices for the end.
            tells_paths = wants_paths(request.vllm_xargs) and type(self) is serving
            return chunks_with_outcome(original, call, tells_paths=tells_paths)

        return stream

    wrap(serving, method, around)


def wrap_do_tracing() -> None:
    """Add budget and depth to the span of a request.

    Why: vLLM makes the span, with a fixed list of attributes, and ends it in one call.
    Nearest hook: OpenTelemetry's span processors, which see the span but not the request; one is used.
    Remove when: vLLM takes further attributes.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def do_tracing(self: OutputProcessor, engine_core_output: Any, *args: Any, **kwargs: Any) -> None:
            outcome = (engine_core_output.kv_transfer_params or {}).get(OUTCOME_KEY)
            if outcome is None:
                return original(self, engine_core_output, *args, **kwargs)
            from vllm_buddy.serving.telemetry.spans import spans_with_outcome

            with spans_with_outcome(outcome):
                return original(self, engine_core_output, *args, **kwargs)

        return do_tracing

    wrap(OutputProcessor, "do_tracing", around)
