"""What vLLM's functions take and return, where the plugin calls, overrides or wraps them."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from tests.harness.vllm_originals import original
from vllm_buddy.serving.compat import TESTED_VLLM, units_problem, vllm_version


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(inspect.unwrap(function)).parameters)


def test_the_tested_version_is_the_installed_one() -> None:
    """Fails if vLLM is updated and nobody looked at what the plugin expects of it."""
    assert vllm_version() in TESTED_VLLM


OF_UNITS = (
    "get_kv_cache_groups",
    "get_num_blocks_to_allocate",
    "allocate_new_blocks",
    "find_longest_cache_hit",
    "cache_blocks of a group",
    "find_longest_cache_hit of a group",
    "get_computed_blocks",
    "_get_slot_mappings",
    "_build_attention_metadata",
    "prepare_attn",
    "commit_block_table",
)


def vllm_functions() -> dict[str, tuple[Callable[..., Any], list[str]]]:
    """Name -> function of vLLM that the plugin wraps, overrides or calls, and the first parameters it relies on."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.forward_context import create_forward_context, override_forward_context, set_forward_context
    from vllm.model_executor.models.llama import LlamaDecoderLayer
    from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
    from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
    from vllm.model_executor.models.registry import _ModelRegistry
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.engine.core_client import DPLBAsyncMPClient, MPClient
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerManager
    from vllm.v1.request import Request
    from vllm.v1.worker.block_table import MultiGroupBlockTable
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.spec_decode.utils import DraftTokensHandler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    layer = ["self", "positions", "hidden_states", "residual"]
    return {
        "_normalize_arch": (original(_ModelRegistry._normalize_arch), ["self", "architecture", "model_config"]),
        "verify": (original(SamplingParams.verify), ["self", "model_config"]),
        "process_inputs": (original(InputProcessor.process_inputs), ["self", "request_id", "prompt", "params"]),
        "chat stream": (
            original(OpenAIServingChat.chat_completion_stream_generator),
            ["self", "request", "result_generator"],
        ),
        "completion stream": (
            original(OpenAIServingCompletion.completion_stream_generator),
            ["self", "request", "engine_inputs", "result_generator"],
        ),
        "generate": (original(AsyncLLM.generate), ["self", "prompt", "sampling_params", "request_id"]),
        "responses": (
            original(OpenAIServingResponses._generate_with_builtin_tools),
            ["self", "request_id", "engine_input", "sampling_params", "context"],
        ),
        "add outputs": (original(RequestOutput.add), ["self", "next_output"]),
        "stat loggers": (original(StatLoggerManager.__init__), ["self", "vllm_config", "engine_idxs"]),
        "record": (
            AggregateStatLoggerBase.record,
            ["self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"],
        ),
        "do_tracing": (
            original(OutputProcessor.do_tracing),
            ["self", "engine_core_output", "req_state", "iteration_stats"],
        ),
        "Scheduler": (Scheduler.__init__, ["self", "vllm_config"]),
        "schedule": (Scheduler.schedule, ["self"]),
        "add_request": (Scheduler.add_request, ["self", "request"]),
        "update_from_output": (Scheduler.update_from_output, ["self", "scheduler_output", "model_runner_output"]),
        "make_stats": (Scheduler.make_stats, ["self"]),
        "_preempt_request": (Scheduler._preempt_request, ["self", "request"]),
        "_free_request": (Scheduler._free_request, ["self", "request"]),
        "_update_request_with_output": (
            Scheduler._update_request_with_output,
            ["self", "request", "new_token_ids"],
        ),
        "cache_blocks": (KVCacheCoordinator.cache_blocks, ["self", "request", "num_computed_tokens"]),
        "get_kv_cache_groups": (
            original(getattr(kv_cache_utils, "get_kv_cache_groups", None)),
            ["vllm_config", "kv_cache_spec"],
        ),
        "get_core_engine_for_request": (
            original(DPLBAsyncMPClient.get_core_engine_for_request),
            ["self", "request"],
        ),
        "sleep": (original(EngineCore.sleep), ["self", "level", "mode"]),
        "make ready response": (original(EngineCoreProc._make_ready_response), ["self"]),
        "apply ready response": (original(MPClient._apply_ready_response), ["self", "payload"]),
        "get_num_blocks_to_allocate": (
            KVCacheCoordinator.get_num_blocks_to_allocate,
            ["self", "request_id", "num_tokens", "new_computed_blocks"],
        ),
        "allocate_new_blocks": (
            KVCacheCoordinator.allocate_new_blocks,
            ["self", "request_id", "num_tokens", "num_tokens_main_model"],
        ),
        "find_longest_cache_hit": (
            KVCacheCoordinator.find_longest_cache_hit,
            ["self", "block_hashes", "max_cache_hit_length"],
        ),
        "pop_blocks_for_free": (KVCacheCoordinator.pop_blocks_for_free, ["self", "request_id"]),
        "free": (KVCacheCoordinator.free, ["self", "request_id"]),
        "get_computed_blocks": (KVCacheManager.get_computed_blocks, ["self", "request"]),
        "cache_blocks of a group": (
            SingleTypeKVCacheManager.cache_blocks,
            ["self", "request", "num_tokens", "retention_interval", "replay_boundaries"],
        ),
        "find_longest_cache_hit of a group": (
            FullAttentionManager.find_longest_cache_hit,
            ["block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec", "drop_eagle_block"],
        ),
        "free_blocks": (BlockPool.free_blocks, ["self", "ordered_blocks"]),
        "update_block_hashes": (Request.update_block_hashes, ["self"]),
        "execute_model": (GPUModelRunner.execute_model, ["self", "scheduler_output"]),
        "sample_tokens": (GPUModelRunner.sample_tokens, ["self"]),
        "initialize_kv_cache": (GPUModelRunner.initialize_kv_cache, ["self"]),
        "_model_forward": (
            GPUModelRunner._model_forward,
            ["self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds"],
        ),
        "_sample": (GPUModelRunner._sample, ["self", "logits", "spec_decode_metadata"]),
        "_get_slot_mappings": (GPUModelRunner._get_slot_mappings, ["self"]),
        "_build_attention_metadata": (GPUModelRunner._build_attention_metadata, ["self"]),
        "prepare_attn": (
            DefaultModelState.prepare_attn,
            ["self", "input_batch", "cudagraph_mode", "block_tables", "slot_mappings"],
        ),
        "commit_block_table": (MultiGroupBlockTable.commit_block_table, ["self", "num_reqs"]),
        "llama layer": (LlamaDecoderLayer.forward, layer),
        "qwen2 layer": (Qwen2DecoderLayer.forward, layer),
        "qwen3 layer": (Qwen3DecoderLayer.forward, layer),
        "do_kv_cache_update": (
            CPUAttentionBackendImpl.do_kv_cache_update,
            ["self", "layer", "key", "value", "kv_cache", "slot_mapping"],
        ),
        "build": (
            CPUAttentionMetadataBuilder.build,
            ["self", "common_prefix_len", "common_attn_metadata", "fast_build"],
        ),
        "set_draft_tokens": (DraftTokensHandler.set_draft_tokens, ["self", "input_batch", "draft_tokens"]),
        "set_forward_context": (set_forward_context, ["attn_metadata", "vllm_config", "num_tokens"]),
        "override_forward_context": (override_forward_context, ["forward_context"]),
        "create_forward_context": (create_forward_context, ["attn_metadata", "vllm_config"]),
    }


@pytest.mark.parametrize("name", list(vllm_functions()))
def test_vllms_functions_take_what_we_give_them(name: str) -> None:
    """Fails if vLLM renames or reorders a parameter that the plugin passes or takes by place."""
    if name in OF_UNITS and (reason := units_problem()):
        pytest.skip(reason)
    function, expected = vllm_functions()[name]
    assert parameters(function)[: len(expected)] == expected


def test_model_forward_passes_keywords_on() -> None:
    """Fails if vLLM's runner no longer hands extra keywords to the model: the step would not arrive."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert inspect.signature(GPUModelRunner._model_forward).parameters["model_kwargs"].kind is (
        inspect.Parameter.VAR_KEYWORD
    )


def test_the_output_of_a_sample_gets_the_parameters_in_the_place_where_we_look() -> None:
    """Fails if the outcome of a sample is another argument, or the request of its parent has another name."""
    from vllm.v1.engine.output_processor import RequestState

    taken = parameters(original(RequestState.make_request_output))
    assert taken[5] == "kv_transfer_params"  # after self and four others
    assert {"parent_req", "request_index"} <= set(parameters(RequestState.__init__))


def test_free_request_returns_both_kinds_of_parameters() -> None:
    """Fails if vLLM changes what the final response is made of: the outcome would be lost."""
    from vllm.v1.core.sched.scheduler import Scheduler

    assert inspect.signature(Scheduler._free_request).return_annotation.__args__.__len__() == 2
