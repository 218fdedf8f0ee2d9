"""Features of vLLM that cannot be combined with routing. Each is refused at start, with the reason."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm import envs
from vllm.platforms import current_platform
from vllm.utils.platform_utils import is_uva_available
from vllm.v1.sample.rejection_sampler import MAX_SPEC_LEN

from vllm_buddy.errors import UnsupportedError
from vllm_buddy.serving.compat import SUPPORTED_ATTENTION_BACKENDS, why_not_attention_backend
from vllm_buddy.serving.schedule.draft_pace import drafts_by_depth

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM's methods of speculative decoding that were tried with routing.
SPECULATORS = ("ngram", "suffix", "draft_model", "eagle", "eagle3", "custom_class")


def _sliding_window(c: "VllmConfig") -> bool:
    hf_config = c.model_config.hf_text_config
    layer_types = getattr(hf_config, "layer_types", None) or ()
    return c.model_config.get_sliding_window() is not None or any("sliding" in t for t in layer_types)


def _is_pipelined(c: "VllmConfig") -> bool:
    return c.parallel_config.pipeline_parallel_size > 1


def _attention_backend(c: "VllmConfig") -> bool:
    backend = c.attention_config.backend
    if backend is None:  # vLLM chooses when it has loaded the weights: FlashInfer on a GPU of capability 10
        capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
        return capability is not None and capability.major == 10
    return why_not_attention_backend(backend.name) is not None


def _rejects_otherwise(c: "VllmConfig") -> bool:
    if c.speculative_config is None:
        return False
    method = c.speculative_config.rejection_sample_method
    return method == "synthetic" or (drafts_by_depth(c) and method != "standard")


def _moves_weights(c: "VllmConfig") -> bool:
    """Whether vLLM's UVAOffloader copies weights to the GPU for each call of a layer."""
    if c.offload_config.uva.cpu_offload_gb <= 0 or current_platform.is_cpu():
        return False
    return envs.VLLM_WEIGHT_OFFLOADING_DISABLE_UVA or not is_uva_available()


# Name of the feature, whether the configuration asks for it, why it cannot be had and what to do.
_CHECKS: list[tuple[str, Callable[["VllmConfig"], bool], str]] = [
    (
        "a pooling or encoder model",
        lambda c: c.model_config.runner_type != "generate" or c.model_config.is_encoder_decoder,
        "routing is for text generation; serve it without --model-impl buddy",
    ),
    ("a multimodal model", lambda c: c.model_config.is_multimodal_model, "only text models are routed"),
    ("a mixture-of-experts model", lambda c: c.model_config.is_moe, "only dense models are routed"),
    (
        "sliding-window attention",
        _sliding_window,
        "the packed KV cache of a layer holds executed tokens only, so a window over them is another window",
    ),
    (
        "the attention backend",
        _attention_backend,
        "layers cannot have metadata of their own with it, such as FlashInfer, vLLM's default on Blackwell GPUs; use "
        f"--attention-backend with one of {', '.join(SUPPORTED_ATTENTION_BACKENDS)} (the last beside an FP8 KV cache)",
    ),
    (
        "LoRA adapters on a GPU",
        lambda c: c.lora_config is not None and (not current_platform.is_cpu() or c.use_v2_model_runner),
        "its kernels take one mapping from rows to adapters per step, and a layer runs a subset of the rows; start "
        "without --enable-lora, or merge the adapter into the weights",
    ),
    (
        "LoRA adapters beside speculative decoding",
        lambda c: c.lora_config is not None and c.speculative_config is not None,
        "drafts were never tried with adapters; start without one of them",
    ),
    (
        "LoRA adapters beside tensor or pipeline parallelism",
        lambda c: c.lora_config is not None and c.parallel_config.world_size > 1,
        "it was never tried; use data parallelism",
    ),
    (
        "this method of speculative decoding",
        lambda c: c.speculative_config is not None and c.speculative_config.method not in SPECULATORS,
        f"it was never tried with routing; choose one of {', '.join(SPECULATORS)}",
    ),
    (
        "lossless drafts beside tensor parallelism",
        lambda c: drafts_by_depth(c) and c.parallel_config.tensor_parallel_size > 1,
        "drafting was never tried with it; use data parallelism, or another speculator",
    ),
    (
        "so many drafts per step",
        lambda c: c.speculative_config is not None and c.speculative_config.num_speculative_tokens > MAX_SPEC_LEN,
        f"vLLM's rejection sampler takes at most {MAX_SPEC_LEN} of a request",
    ),
    (
        "numbers of lossless drafts by batch size",
        lambda c: drafts_by_depth(c) and c.speculative_config.num_speculative_tokens_per_batch_size is not None,
        "how many drafts pay is measured while serving; leave out num_speculative_tokens_per_batch_size",
    ),
    (
        "this rejection sampling of drafts",
        _rejects_otherwise,
        "drafts are accepted by chance, or on CPU not at all; leave out rejection_sample_method",
    ),
    (
        "asynchronous scheduling of drafts",
        lambda c: c.speculative_config is not None and c.scheduler_config.async_scheduling is True,
        "the plan of a step needs to know which drafts of the step before were accepted; leave out --async-scheduling",
    ),
    (
        "a KV connector",
        lambda c: c.kv_transfer_config is not None,
        "transferred blocks carry no record of the layers each token executed; start without --kv-transfer-config",
    ),
    (
        "KV offloading",
        lambda c: c.cache_config.kv_offloading_size is not None,  # vLLM makes it a KV connector after this hook
        "offloaded blocks carry no record of the layers each token executed; start without --kv-offloading-size",
    ),
    (
        "prefetching of offloaded weights",
        lambda c: c.offload_config.offload_backend == "prefetch" or c.offload_config.prefetch.offload_group_size > 0,
        "a layer that is skipped would not ask for the weights of the next; use --cpu-offload-gb",
    ),
    (
        "weights on the CPU without unified addressing",
        _moves_weights,
        "vLLM then moves a layer's weights in its forward, and a layer runs in parts here; unset "
        "VLLM_WEIGHT_OFFLOADING_DISABLE_UVA, or leave out --cpu-offload-gb",
    ),
    (
        "weight transfer",
        lambda c: c.weight_transfer_config is not None,
        "compiled layers and the bypass belong to the weights loaded at start",
    ),
    ("an encoder-cache connector", lambda c: c.ec_transfer_config is not None, "only text models are routed"),
    (
        "drafts beside pipeline parallelism",
        lambda c: _is_pipelined(c) and c.speculative_config is not None,
        "they were never tried with it; use tensor or data parallelism, or leave out --speculative-config",
    ),
    (
        "pipeline parallelism on Model Runner V2",
        lambda c: _is_pipelined(c) and c.use_v2_model_runner,
        "it was never tried, because it needs CUDA streams; set VLLM_USE_V2_MODEL_RUNNER=0",
    ),
    (
        "asynchronous scheduling of a pipeline",
        lambda c: _is_pipelined(c) and c.scheduler_config.async_scheduling is True and not current_platform.is_cpu(),
        "several tokens of a request would be on their way when its layers are decided; leave out --async-scheduling",
    ),
    (
        "pipeline parallelism with this executor",
        lambda c: _is_pipelined(c) and c.parallel_config.distributed_executor_backend not in (None, "mp"),
        "it was tried with processes of one machine only; use --distributed-executor-backend mp",
    ),
    (
        "context parallelism",
        lambda c: (
            c.parallel_config.decode_context_parallel_size > 1 or c.parallel_config.prefill_context_parallel_size > 1
        ),
        "slots of a layer are not a function of the position",
    ),
    (
        "dual-batch overlap",
        lambda c: c.parallel_config.enable_dbo,
        "the plan covers the whole batch; start without --enable-dbo",
    ),
    (
        "prompt embeddings",
        lambda c: c.model_config.enable_prompt_embeds,
        "the router reads token ids; start without --enable-prompt-embeds",
    ),
    (
        "KV-sharing fast prefill",
        lambda c: c.cache_config.kv_sharing_fast_prefill,
        "both replace the attention metadata of single layers",
    ),
    (
        "a custom worker",
        lambda c: c.parallel_config.worker_cls != "auto",
        "vllm_buddy sets --worker-cls itself",
    ),
    (
        "a custom scheduler",
        lambda c: c.scheduler_config.scheduler_cls is not None,
        "vllm_buddy routes in its own scheduler; start without --scheduler-cls",
    ),
    (
        "VLLM_BATCH_INVARIANT on a GPU",
        lambda _: envs.VLLM_BATCH_INVARIANT and not current_platform.is_cpu(),
        "rows of layers that others skip are normalised by another kernel, so results would follow the batch; unset it",
    ),
    (
        "the Rust front end",
        lambda _: os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
        "it does not validate a request's buddy_budget; unset VLLM_USE_RUST_FRONTEND",
    ),
]


def refuse_unsupported(vllm_config: "VllmConfig") -> None:
    """Raise UnsupportedError with every reason why this configuration cannot be routed."""
    reasons = [f"{name}: {reason}" for name, asked_for, reason in _CHECKS if asked_for(vllm_config)]
    if reasons:
        raise UnsupportedError("--model-impl buddy cannot be combined with " + "; and not with ".join(reasons))
