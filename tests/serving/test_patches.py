"""What the plugin changes in vLLM, and what it expects of vLLM's side."""

import asyncio
import inspect
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.harness.engine import Tiny
from tests.harness.server_config import BASE
from vllm_buddy.errors import UnsupportedError
from vllm_buddy.serving import patches
from vllm_buddy.serving.compat import TESTED_VLLM, units_problem, vllm_version


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(inspect.unwrap(function)).parameters)


def original(function: Any) -> Any:
    """vLLM's own function behind our wrapper."""
    return getattr(function, patches._MARK, function)


def test_the_tested_version_is_the_installed_one() -> None:
    """Fails if vLLM is updated and nobody looked at what the plugin expects of it."""
    assert vllm_version() in TESTED_VLLM


def test_sleep_that_would_lose_the_bypass_is_refused_before_anything_is_paused() -> None:
    """Fails if a server that slept serves what is left of a bypass, or one that refuses to sleep has stopped."""
    from vllm.v1.engine.core import EngineCore

    patches._wrap_sleep()
    called: list[Any] = []
    engine: Any = SimpleNamespace(
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(model_impl="buddy")),
        pause_scheduler=lambda **_: called.append("pause"),
        model_executor=SimpleNamespace(sleep=called.append),
    )
    with pytest.raises(UnsupportedError, match="level 1 only"):
        EngineCore.sleep(engine, 2)
    assert called == []
    EngineCore.sleep(engine, 1)
    engine.vllm_config.model_config.model_impl = "auto"
    EngineCore.sleep(engine, level=2)
    assert called == ["pause", 1, "pause", 2]


def test_streams_in_another_protocol_tell_no_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if Anthropic's converter gets chunks without choices, which end the message for its clients."""

    class Serving:
        model_config = None

        async def stream(self, request: Any, result_generator: Any) -> Any:
            async for _ in result_generator:
                yield 'data: {"choices": [{"index": 0, "finish_reason": null}]}\n\n'

    class Converting(Serving):
        pass

    async def results() -> Any:
        yield SimpleNamespace(kv_transfer_params={"buddy": {"paths": {}}})

    async def chunks(serving: Serving) -> list[Any]:
        request = SimpleNamespace(vllm_xargs={"buddy_paths": True}, use_beam_search=False)
        return [json.loads(chunk[6:])["choices"] async for chunk in serving.stream(request, results())]

    monkeypatch.setattr(patches, "_is_routed", lambda serving: True)
    monkeypatch.setattr(patches, "verify_options", lambda extra_args, model_config: None)
    patches._wrap_stream(Serving, "stream")
    assert len(asyncio.run(chunks(Serving()))) == 2
    assert len(asyncio.run(chunks(Converting()))) == 1


def test_applying_the_patches_again_changes_nothing() -> None:
    """Fails if vLLM, which loads plugins in several places, wraps a method twice."""
    import vllm.entrypoints.openai.api_server  # noqa: F401 - streams are wrapped in its process only
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.model_executor.models.registry import _ModelRegistry
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.engine.core_client import DPLBAsyncMPClient, MPClient
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.metrics.loggers import StatLoggerManager

    def found() -> tuple[Callable[..., Any], ...]:
        return (
            _ModelRegistry._normalize_arch,
            SamplingParams.verify,
            InputProcessor.process_inputs,
            RequestState.make_request_output,
            RequestOutput.add,
            *(() if units_problem() else (kv_cache_utils.get_kv_cache_groups,)),
            DPLBAsyncMPClient.get_core_engine_for_request,
            EngineCoreProc._make_ready_response,
            EngineCore.sleep,
            MPClient._apply_ready_response,
            StatLoggerManager.__init__,
            OutputProcessor.do_tracing,
            OpenAIServingChat.chat_completion_stream_generator,
            OpenAIServingCompletion.completion_stream_generator,
        )

    patches.apply()
    before = found()
    patches.apply()
    assert found() == before
    for wrapped in before:
        assert hasattr(wrapped, patches._MARK)
        assert not hasattr(original(wrapped), patches._MARK)


@pytest.mark.parametrize("architecture", [*patches.ROUTED_ARCHITECTURES, "GemmaForCausalLM"])
@pytest.mark.parametrize("model_impl", ["auto", "vllm", "transformers"])
def test_other_model_implementations_see_vllms_own_registry(architecture: str, model_impl: str) -> None:
    """Fails if the plugin changes which class serves a model that did not ask for routing."""
    from types import SimpleNamespace

    from vllm.model_executor.models import ModelRegistry

    config = SimpleNamespace(model_impl=model_impl, convert_type="none", runner_type="generate")
    patched = ModelRegistry._normalize_arch(architecture, config)
    assert patched == original(type(ModelRegistry)._normalize_arch)(ModelRegistry, architecture, config)
    assert not patched.startswith("Buddy")


def test_other_model_implementations_are_configured_as_without_the_plugin(tiny: Callable[[str], Tiny]) -> None:
    """Fails if the plugin leaves a trace in the configuration of a stock server, or checks its requests."""
    from vllm import EngineArgs, SamplingParams

    options = {**BASE, "model_impl": "auto", "model": str(tiny("llama").folder)}
    config = EngineArgs(**options, additional_config={"buddy": {"nonsense": 1}}).create_engine_config()
    assert config.scheduler_config.scheduler_cls is None
    assert "buddy" not in config.parallel_config.worker_cls.lower()
    assert not hasattr(config.model_config, "buddy_limits")
    params = SamplingParams(extra_args={"buddy_budget": "no number", "buddy_other": 1})
    params.verify(config.model_config, None, config.structured_outputs_config, None)


def test_the_registered_classes_exist_and_are_routed() -> None:
    """Fails if a class named in the table cannot be imported, which vLLM would find out in its worker."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_buddy.serving.forward import models
    from vllm_buddy.serving.start.hook import BuddyModelConfig

    for stock, routed in patches.ROUTED_ARCHITECTURES.items():
        cls = getattr(models, routed)
        assert stock in [base.__name__ for base in cls.__mro__]
        assert issubclass(cls, models._Routed)
        assert routed in ModelRegistry.models
        assert MODELS_CONFIG_MAP[routed] is BuddyModelConfig


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


def test_sampling_of_drafts_still_needs_to_be_mended() -> None:
    """Fails if vLLM's CPU kernel copies its result back: then the change can go. Or if ours computes something else."""
    import torch
    from vllm.platforms import current_platform
    from vllm.utils import cpu_triton_utils
    from vllm.v1.sample.ops import topk_topp_sampler

    from vllm_buddy.serving.compat import _apply_top_k_top_p, _expand_batch_to_tokens

    values, ends = torch.tensor([0.0, 0.7, 1.5]), torch.tensor([2, 2, 5], dtype=torch.int32)
    assert _expand_batch_to_tokens(values, ends, 5, 0, 1).tolist() == pytest.approx([1.0, 1.0, 1.5, 1.5, 1.5])
    assert _expand_batch_to_tokens(torch.tensor([3, 4, 5]), ends, 5).tolist() == [3, 3, 5, 5, 5]
    if current_platform.is_cpu():
        result = torch.full((5,), -1.0)
        cpu_triton_utils._expand_kernel_impl(result, values, ends, 0, 1)
        assert result.tolist() == [-1.0] * 5
        none = torch.empty(0, 8)
        with pytest.raises(RuntimeError):
            topk_topp_sampler.apply_top_k_top_p(none, torch.empty(0, dtype=torch.int32), None)
        assert _apply_top_k_top_p(none, torch.empty(0, dtype=torch.int32), None) is none


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


def test_a_request_hashes_its_blocks_the_way_we_cut_them() -> None:
    """Fails if Request keeps its hashes or its hasher elsewhere: the chain would not end where the path does."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    from vllm_buddy.serving.schedule.prefix_cache import end_hash_chain, salt

    def hasher(request: Request) -> list[Any]:
        return [(request.cache_salt, i) for i in range(len(request.block_hashes), request.num_tokens // 4)]

    request = Request("r", list(range(10)), SamplingParams(max_tokens=8), None, block_hasher=hasher)
    assert request.block_hashes == [(None, 0), (None, 1)]
    salt(request, "path")
    assert [block for _, block in request.block_hashes] == [0, 1]
    assert all("path" in block_salt for block_salt, _ in request.block_hashes)
    end_hash_chain(request, 1)
    request.append_output_token_ids([1] * 8)
    assert len(request.block_hashes) == 1


def test_all_publishing_goes_through_the_coordinator() -> None:
    """Fails if vLLM publishes blocks by another way than the one that is limited to one path."""
    from vllm.v1.core import kv_cache_coordinator, kv_cache_manager
    from vllm.v1.core.sched import async_scheduler, scheduler

    manager = inspect.getsource(kv_cache_manager)
    assert manager.count(".cache_blocks(") == manager.count("self.coordinator.cache_blocks(request, num_") == 2
    for module in (scheduler, async_scheduler):
        source = inspect.getsource(module)
        assert source.count(".cache_blocks(") == source.count("self.kv_cache_manager.cache_blocks(")
    assert "cache_full_blocks" not in inspect.getsource(kv_cache_coordinator) + manager


def test_the_coordinator_has_no_method_that_units_forget() -> None:
    """Fails if vLLM's coordinator gives or takes blocks by a new method, which would see the groups of all units."""
    if reason := units_problem():
        pytest.skip(reason)
    from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, KVCacheCoordinator

    methods = {n for c in (KVCacheCoordinator, HybridKVCacheCoordinator) for n, f in vars(c).items() if callable(f)}
    # What is not overridden works on the lists of blocks that a request has, or on no request.
    assert {name for name in methods if not name.startswith("_")} == {
        "allocate_new_blocks",
        "allocate_new_computed_blocks",
        "cache_blocks",
        "emit_cached_block_events",
        "find_longest_cache_hit",
        "find_longest_cache_hit_per_group",
        "free",
        "get_blocks",
        "get_num_blocks_to_allocate",
        "get_num_cacheable_tokens",
        "new_step_starts",
        "pop_blocks_for_free",
        "remove_skipped_blocks",
        "reset_prefix_cache",
        "verify_and_split_kv_cache_groups",
    }


def test_the_block_tables_have_no_method_that_unit_tables_forget() -> None:
    """Fails if vLLM fills or copies block tables by a new method, which would not know that units share a buffer."""
    if reason := units_problem():
        pytest.skip(reason)
    from vllm.v1.worker.block_table import MultiGroupBlockTable

    # What UnitTables does not override works row by row on the table of each group.
    by_row = {"append_row", "add_row", "clear_row", "move_row", "swap_row", "clear"}
    methods = {name for name, value in vars(MultiGroupBlockTable).items() if callable(value) and name[0] != "_"}
    assert methods == {*by_row, "compute_slot_mapping", "commit_block_table"}
