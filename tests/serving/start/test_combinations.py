"""Features of vLLM that are refused beside routing, on real configurations and on a server's command line."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests.harness.engine import Tiny
from tests.harness.server_config import BASE, DRAFTS, NGRAM, START_TIMEOUT_S, as_arguments, configure, refusal
from vllm_buddy.serving.start.refusals import _CHECKS

CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"hf_overrides": {"architectures": ["GemmaForCausalLM"]}},
        "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM",
    ),
    "sliding window": ({"hf_overrides": {"sliding_window": 16}}, "sliding-window"),
    "sliding layers": ({"hf_overrides": {"layer_types": ["sliding_attention"] * 8}}, "sliding-window"),
    "LoRA beside drafts": ({"enable_lora": True, "speculative_config": NGRAM}, "LoRA adapters beside speculative"),
    "LoRA of two ranks": ({"enable_lora": True, "tensor_parallel_size": 2}, "LoRA adapters beside tensor or pipeline"),
    "KV connector": ({"kv_transfer_config": CONNECTOR}, "--kv-transfer-config"),
    "KV offloading": ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
    "speculator": (
        {"speculative_config": {**NGRAM, "method": "ngram_gpu"}},
        "choose one of ngram, suffix, draft_model, eagle, eagle3, custom_class",
    ),
    "drafts of two ranks": ({"speculative_config": DRAFTS, "tensor_parallel_size": 2}, "tensor parallelism"),
    "many drafts": ({"speculative_config": {**NGRAM, "num_speculative_tokens": 129}}, "at most 128 of a request"),
    "drafts by batch size": (
        {"speculative_config": {**DRAFTS, "num_speculative_tokens_per_batch_size": [[1, 4, 2], [5, 99, 1]]}},
        "leave out num_speculative_tokens_per_batch_size",
    ),
    "drafts by chance": (
        {
            "speculative_config": {
                **NGRAM,
                "rejection_sample_method": "synthetic",
                "synthetic_acceptance_rates": [0.5, 0.4],
            }
        },
        "leave out rejection_sample_method",
    ),
    "block rejection": (
        {"speculative_config": {**DRAFTS, "rejection_sample_method": "block"}},
        "leave out rejection_sample_method",
    ),
    "asynchronous drafts": ({"speculative_config": NGRAM, "async_scheduling": True}, "--async-scheduling"),
    "FlashInfer": ({"attention_config": {"backend": "FLASHINFER"}}, "--attention-backend with one of CPU_ATTN"),
    "FlexAttention": ({"attention_config": {"backend": "FLEX_ATTENTION"}}, "--attention-backend with one of CPU_ATTN"),
    "drafts of two stages": ({"speculative_config": NGRAM, "pipeline_parallel_size": 2}, "--speculative-config"),
    "scheduler": ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
    "worker": ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "--worker-cls"),
    "prompt embeddings": ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
    "pooling": ({"runner": "pooling", "convert": "embed"}, "text generation"),
    "prefetch": ({"offload_group_size": 2, "offload_num_in_group": 1}, "--cpu-offload-gb"),
    "weight transfer": ({"weight_transfer_config": {"backend": "nccl"}}, "weight transfer"),
    "dual batch": ({"enable_dbo": True}, "--enable-dbo"),
    "whole compilation": ({"enforce_eager": False, "compilation_config": {"mode": 1}}, "STOCK_TORCH_COMPILE"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_routed_is_refused_with_the_reason(llama_model: Tiny, name: str) -> None:
    """Fails if a feature that routing breaks starts, or the user is not told which and what to do."""
    options, told = UNSUPPORTED[name]
    assert told in refusal(llama_model, **options)
    if name not in ("architecture", "sliding window", "sliding layers", "whole compilation"):
        return
    # The same without routing is vLLM's affair, and starts.
    configure(llama_model, additional_config={}, **{**options, "model_impl": "auto"})


@pytest.mark.slow
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_server_says_so_in_one_line_and_ends(llama_model: Tiny, name: str) -> None:
    """Fails if `vllm-buddy serve` starts such a server, or shows its user a traceback, or nothing."""
    options, told = UNSUPPORTED[name]
    settings = {"buddy": {"artifact": str(llama_model.artifact_folder)}}
    arguments = as_arguments({**BASE, "additional_config": settings, **options})
    command = [sys.executable, "-m", "vllm_buddy", "serve", str(llama_model.folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    assert done.returncode == 2, done.stderr[-2000:]
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("vllm-buddy: error:"))
    assert told in error
    assert "Traceback" not in done.stdout + done.stderr


def test_pipeline_stages_start_where_they_were_tried(llama_model: Tiny) -> None:
    """Fails if pipeline parallelism is refused, or an executor or a model runner of which nothing is known is not."""
    assert configure(llama_model, pipeline_parallel_size=2).parallel_config.worker_cls.startswith("vllm_buddy.")
    asked_for = {name: check for name, check, _ in _CHECKS}
    for backend, is_v2 in (("mp", False), ("ray", False), ("mp", True)):
        parallel = SimpleNamespace(pipeline_parallel_size=2, distributed_executor_backend=backend)
        config: Any = SimpleNamespace(parallel_config=parallel, use_v2_model_runner=is_v2)
        assert asked_for["pipeline parallelism on Model Runner V2"](config) == is_v2
        assert asked_for["pipeline parallelism with this executor"](config) == (backend == "ray")


def test_adapters_need_a_policy_that_leaves_their_keys_alone(llama_model: Tiny) -> None:
    """Fails if skipped layers write K and V without the request's adapter."""
    configure(llama_model, {"kv_policy": "masked"}, enable_lora=True)
    refused = refusal(llama_model, {"kv_policy": "kv_only"}, enable_lora=True)
    assert "kv_policy: kv_only projects" in refused
    assert "choose masked or zero" in refused


def test_the_rust_front_end_is_refused(llama_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a front end that validates no budgets is put before a routed engine."""
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert "VLLM_USE_RUST_FRONTEND" in refusal(llama_model)
