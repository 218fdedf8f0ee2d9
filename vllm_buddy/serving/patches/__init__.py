"""All changes to vLLM's code: sixteen wrapped functions, and a table entry for each routed model class.

Each module has those of one side of vLLM. The docstring of each `wrap_` function says why it is there, what vLLM's
nearest hook is, and when it can be removed. All act only where model_impl is "buddy", and applying them again changes
nothing. tests/serving/test_patches.py and test_vllm_signatures.py fail when vLLM's side moves.
"""

import sys
from importlib import import_module

from vllm.v1.engine.async_llm import AsyncLLM

from vllm_buddy.serving.patches.answers import (
    wrap_add_outputs,
    wrap_do_tracing,
    wrap_make_request_output,
    wrap_stream,
)
from vllm_buddy.serving.patches.architectures import register_models, wrap_normalize_arch
from vllm_buddy.serving.patches.engine_core import (
    wrap_get_kv_cache_groups,
    wrap_ready_response,
    wrap_sleep,
    wrap_stat_loggers,
)
from vllm_buddy.serving.patches.requests import (
    wrap_generate,
    wrap_get_core_engine_for_request,
    wrap_process_inputs,
    wrap_verify,
)

_API_SERVER = "vllm.entrypoints.launchers.api_server"
# Modules of the API server, their class and its method that streams an answer.
_STREAMS = (
    ("vllm.entrypoints.openai.chat_completion.serving", "OpenAIServingChat", "chat_completion_stream_generator"),
    ("vllm.entrypoints.openai.completion.serving", "OpenAIServingCompletion", "completion_stream_generator"),
)


def apply() -> None:
    """Register the routed models and apply the patches. Calling it again changes nothing."""
    register_models()
    wrap_normalize_arch()
    wrap_verify()
    wrap_process_inputs()
    wrap_generate(AsyncLLM, "generate", prompt="prompt")
    wrap_get_kv_cache_groups()
    wrap_make_request_output()
    wrap_add_outputs()
    wrap_get_core_engine_for_request()
    wrap_ready_response()
    wrap_sleep()
    wrap_stat_loggers()
    wrap_do_tracing()
    if _API_SERVER in sys.modules:  # in no other process does anything stream over HTTP
        for module, class_name, method in _STREAMS:
            wrap_stream(getattr(import_module(module), class_name), method)
        from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

        wrap_generate(OpenAIServingResponses, "_generate_with_builtin_tools", prompt="engine_input")
