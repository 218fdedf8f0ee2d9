"""All changes to vLLM's code: sixteen wrapped functions, and a table entry for each routed model class.

The docstring of each `_wrap_` function says why it is there, what vLLM's nearest hook is, and when it can be removed.
All act only where model_impl is "buddy", and applying them again changes nothing. tests/serving/test_vllm_signatures.py
and tests/serving/test_vllm_internals.py fail when vLLM's side moves.
"""

import inspect
import sys
from collections.abc import AsyncIterator, Callable
from importlib import import_module
from typing import Any

from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import _ModelRegistry
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.core_client import DPLBAsyncMPClient, MPClient
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager

from vllm_buddy.errors import UnsupportedError
from vllm_buddy.serving.admission.option_names import OUTCOME_KEY
from vllm_buddy.serving.admission.options import verify_options, verify_request, verify_tokenized, wants_paths
from vllm_buddy.serving.admission.replicas import ReplicaChooser
from vllm_buddy.serving.compat import add_to_ready_response, groups_by_units, told_when_ready, units_problem
from vllm_buddy.serving.schedule.outcome import is_outcome, joined, with_samples
from vllm_buddy.serving.start.agreement import Served, refuse_differences
from vllm_buddy.serving.start.attached import kv_units_of, served_of
from vllm_buddy.serving.start.hook import BuddyModelConfig
from vllm_buddy.serving.start.refusal_note import telling_refusals
from vllm_buddy.serving.telemetry.stream import chunks_with_outcome

MODEL_IMPL = "buddy"

# vLLM's architecture name -> our class, as registered below.
ROUTED_ARCHITECTURES = {
    "LlamaForCausalLM": "BuddyLlamaForCausalLM",
    "MistralForCausalLM": "BuddyMistralForCausalLM",
    "Qwen2ForCausalLM": "BuddyQwen2ForCausalLM",
    "Qwen3ForCausalLM": "BuddyQwen3ForCausalLM",
}
_MODELS_MODULE = "vllm_buddy.serving.forward.models"
_MARK = "_vllm_buddy_original"
_API_SERVER = "vllm.entrypoints.launchers.api_server"
# Modules of the API server, their class and its method that streams an answer.
_STREAMS = (
    ("vllm.entrypoints.openai.chat_completion.serving", "OpenAIServingChat", "chat_completion_stream_generator"),
    ("vllm.entrypoints.openai.completion.serving", "OpenAIServingCompletion", "completion_stream_generator"),
)


def apply() -> None:
    """Register the routed models and apply the patches. Calling it again changes nothing."""
    _register_models()
    _wrap_normalize_arch()
    _wrap_verify()
    _wrap_process_inputs()
    _wrap_generate(AsyncLLM, "generate", prompt="prompt")
    _wrap_get_kv_cache_groups()
    _wrap_make_request_output()
    _wrap_add_outputs()
    _wrap_get_core_engine_for_request()
    _wrap_ready_response()
    _wrap_sleep()
    _wrap_stat_loggers()
    _wrap_do_tracing()
    if _API_SERVER in sys.modules:  # in no other process does anything stream over HTTP
        for module, class_name, method in _STREAMS:
            _wrap_stream(getattr(import_module(module), class_name), method)
        from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

        _wrap_generate(OpenAIServingResponses, "_generate_with_builtin_tools", prompt="engine_input")


def _register_models() -> None:
    for routed in ROUTED_ARCHITECTURES.values():
        # As a string, so that vLLM imports the model code only in the processes that need it.
        if routed not in ModelRegistry.models:
            ModelRegistry.register_model(routed, f"{_MODELS_MODULE}:{routed}")
        MODELS_CONFIG_MAP[routed] = BuddyModelConfig


def _wrap(owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the function `name` of a class or module by what `around` makes of it, unless that has been done.

    around: called with vLLM's function.
    """
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return
    wrapped = around(original)
    setattr(wrapped, _MARK, original)
    setattr(owner, name, wrapped)


def _is_buddy(model_config: Any) -> bool:
    """Whether a model is routed. model_config: vLLM's; None: there is no model."""
    return getattr(model_config, "model_impl", None) == MODEL_IMPL


def _is_routed(owner: Any) -> bool:
    """Whether what vLLM serves is routed. owner: has vLLM's ModelConfig as `model_config`, or no model at all."""
    return _is_buddy(getattr(owner, "model_config", None))


def _wrap_normalize_arch() -> None:
    """Map a supported architecture to its routed class, and refuse the others by name.

    Why: `--model-impl` accepts any string, but the registry knows a fixed list of implementations.
    Nearest hook: `--model-class-overrides`, which does not look at `--model-impl` and calls no config hook.
    Remove when: ModelRegistry can register an implementation for a value of `--model-impl`.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def normalize_arch(self: Any, architecture: str, model_config: Any) -> str:
            if not _is_buddy(model_config):
                return original(self, architecture, model_config)
            if architecture not in ROUTED_ARCHITECTURES:
                raise UnsupportedError(
                    f"--model-impl buddy does not support the architecture {architecture!r}; "
                    f"supported are {', '.join(ROUTED_ARCHITECTURES)}"
                )
            return ROUTED_ARCHITECTURES[architecture]

        return normalize_arch

    _wrap(_ModelRegistry, "_normalize_arch", around)


def _wrap_verify() -> None:
    """Validate a request's buddy options where vLLM validates its own: HTTP 400 in the server.

    Why: vLLM does not know the options in `vllm_xargs`, and only an error raised here becomes HTTP 400.
    Nearest hook: `SamplingParams._verify_extra_args`, which checks the range of integers only.
    Remove when: plugins can register a validator of `extra_args`.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def verify(self: SamplingParams, model_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, model_config, *args, **kwargs)
            if _is_buddy(model_config):
                verify_options(self.extra_args, model_config)

        return verify

    _wrap(SamplingParams, "verify", around)


def _wrap_process_inputs() -> None:
    """Validate what depends on the prompt, where vLLM has tokenized it and the request has not left for the engine.

    These are the token ids and some of the options.

    Why, nearest hook: as in _wrap_verify; `SamplingParams.verify` does not get the prompt.
    Remove when: that validator gets the tokenized prompt.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
            request = original(self, *args, **kwargs)
            params = request.sampling_params
            if _is_routed(self) and isinstance(params, SamplingParams):
                verify_tokenized(
                    request.prompt_token_ids, params, self.model_config, is_streaming_input=request.resumable
                )
            return request

        return process_inputs

    _wrap(InputProcessor, "process_inputs", around)


def _wrap_generate(owner: type, method: str, prompt: str) -> None:
    """Refuse a request that cannot be served when its answer is asked for, not when the first part of it is.

    owner, method: one of vLLM's asynchronous generators of answers. prompt: its parameter with the prompt.

    Why: vLLM verifies a request where the generator first runs, and the answer of a streamed request has begun by then:
    with HTTP 200. In the Responses API, a stream then breaks off, and one in the background waits for ever.
    Nearest hook: as in _wrap_verify.
    Remove when: vLLM verifies before it answers.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            if _is_routed(self):
                given = signature.bind(self, *args, **kwargs).arguments
                verify_request(given[prompt], given["sampling_params"], self.model_config)
            return original(self, *args, **kwargs)

        return generate

    _wrap(owner, method, around)


def _wrap_get_core_engine_for_request() -> None:
    """Choose a replica by budget and load, where vLLM chooses one by load and the request names none.

    Why: batches of like budgets are faster, and vLLM's balancer looks at load alone.
    Nearest hook: the header `X-data-parallel-rank`, which a client would have to send without knowing the load.
    Remove when: the balancer is a class that can be named.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_core_engine_for_request(self: DPLBAsyncMPClient, request: Any) -> Any:
            is_ours = _is_routed(self.vllm_config)
            if is_ours and request.data_parallel_rank is None and request.request_id not in self.reqs_in_flight:
                chooser = self.__dict__.get("buddy_replicas")
                if chooser is None:
                    chooser = self.buddy_replicas = ReplicaChooser(self.vllm_config, self.eng_start_index)
                request.data_parallel_rank = chooser.rank(self, request)
            return original(self, request)

        return get_core_engine_for_request

    _wrap(DPLBAsyncMPClient, "get_core_engine_for_request", around)


def _wrap_ready_response() -> None:
    """Compare what the replicas serve, where vLLM's engines tell their front ends that they are ready.

    Why: with `--headless`, an engine on another node has a configuration of its own, and vLLM compares it for models
    that are mixtures of experts only.
    Nearest hook: none.
    Remove when: the hash in vLLM's handshake covers additional_config, for all models.
    """

    def around_make(original: Callable[..., Any]) -> Callable[..., Any]:
        def make_ready_response(self: EngineCoreProc) -> Any:
            response = original(self)
            if not _is_routed(self.vllm_config):
                return response
            return add_to_ready_response(response, served_of(self.vllm_config.model_config))

        return make_ready_response

    def around_apply(original: Callable[..., Any]) -> Callable[..., Any]:
        def apply_ready_response(self: MPClient, payload: bytes) -> None:
            original(self, payload)
            if _is_routed(self.vllm_config) and (told := told_when_ready(payload)) is not None:
                rank, found = told
                with telling_refusals():
                    refuse_differences(served_of(self.vllm_config.model_config), [(f"replica {rank}", Served(*found))])

        return apply_ready_response

    _wrap(EngineCoreProc, "_make_ready_response", around_make)
    _wrap(MPClient, "_apply_ready_response", around_apply)


def _wrap_get_kv_cache_groups() -> None:
    """Give each KV unit a group, where the config hook chose units. vLLM imports the function late in other modules.

    Why: vLLM groups layers by the kind of their caches, and those of one model are alike.
    Nearest hook: a KVCacheSpec of our own per unit, which vLLM would take for several kinds of attention.
    Remove when: a model class can name the groups (`SupportsKVCacheGrouping`, from vLLM 0.33 on).
    """
    if units_problem():  # the config hook refuses units then
        return

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_kv_cache_groups(vllm_config: Any, kv_cache_spec: Any) -> Any:
            groups = original(vllm_config, kv_cache_spec)
            units = kv_units_of(vllm_config.model_config) if _is_routed(vllm_config) else None
            return groups if units is None else groups_by_units(groups, units)

        return get_kv_cache_groups

    _wrap(kv_cache_utils, "get_kv_cache_groups", around)


def _wrap_make_request_output() -> None:
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

    _wrap(RequestState, "make_request_output", around)


def _wrap_add_outputs() -> None:
    """Keep the paths of both, where vLLM adds an output to one that the client has not read yet.

    Why: of such outputs, vLLM keeps the parameters of the last one.
    Nearest hook, remove when: as in _wrap_make_request_output.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def add(self: RequestOutput, next_output: RequestOutput, *args: Any, **kwargs: Any) -> None:
            before = self.kv_transfer_params
            same = [output.index for output in self.outputs] == [output.index for output in next_output.outputs]
            original(self, next_output, *args, **kwargs)
            told: Any = joined(before, self.kv_transfer_params, same_sample=same)
            self.kv_transfer_params = told

        return add

    _wrap(RequestOutput, "add", around)


def _wrap_stat_loggers() -> None:
    """Record the scheduler's figures beside vLLM's own, where a front end makes its loggers.

    Why: the metrics `vllm_buddy:*` are shown for models that are routed only, and offline too.
    Nearest hook: the entry points `vllm.stat_logger_plugins`. One that is installed turns on the statistics of every
    server, also of one without routing that was started with `--disable-log-stats`; and `LLM` does not load them.
    Remove when: a plugin can decline a configuration.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(self: StatLoggerManager, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, vllm_config, *args, **kwargs)
            if _is_routed(vllm_config):
                from vllm_buddy.serving.telemetry.stat_logger import BuddyStatLogger

                vllms = next(logger for logger in self.stat_loggers if isinstance(logger, PrometheusStatLogger))
                # First, because it takes the figures out of what the others read.
                self.stat_loggers.insert(0, BuddyStatLogger(vllm_config, self.engine_indexes, vllms))

        return init

    _wrap(StatLoggerManager, "__init__", around)


def _wrap_sleep() -> None:
    """Refuse level 2, which drops the bypass, that vLLM could not load again, before anything is paused.

    Why: the worker, whose class is ours, is asked after vLLM has ended all requests and paused.
    Nearest hook: the worker's `sleep`.
    Remove when: vLLM asks before it pauses.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def sleep(self: EngineCore, level: int = 1, *args: Any, **kwargs: Any) -> Any:
            if level >= 2 and _is_routed(self.vllm_config):
                raise UnsupportedError(
                    "--model-impl buddy can sleep at level 1 only: level 2 would drop the bypass for good"
                )
            return original(self, level, *args, **kwargs)

        return sleep

    _wrap(EngineCore, "sleep", around)


def _wrap_do_tracing() -> None:
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

    _wrap(OutputProcessor, "do_tracing", around)


def _wrap_stream(serving: type, method: str) -> None:
    """Stream the outcome of a request in its last chunk, and its paths, if it asks for them, in chunks of their own.

    serving: OpenAIServingChat or OpenAIServingCompletion. method: its generator of chunks.

    Why: vLLM's streamed chunks leave out the `kv_transfer_params` that its whole responses have.
    Nearest hook: `--middleware`, which would have to parse the answers of all requests.
    Remove when: vLLM streams `kv_transfer_params`.
    """

    def around(original: Callable[..., AsyncIterator[str]]) -> Callable[..., AsyncIterator[str]]:
        signature = inspect.signature(original)

        def stream(self: Any, request: Any, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
            if not _is_routed(self):
                return original(self, request, *args, **kwargs)
            call = signature.bind(self, request, *args, **kwargs)
            # A subclass writes the chunks in another protocol: Anthropic's takes one without choices for the end.
            tells_paths = wants_paths(request.vllm_xargs) and type(self) is serving
            return chunks_with_outcome(original, call, tells_paths=tells_paths)

        return stream

    _wrap(serving, method, around)
