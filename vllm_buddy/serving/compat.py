"""Everything in serving that depends on vLLM's version or reads vLLM's internals, and the versions tested."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from vllm_buddy.errors import UnsupportedError
from vllm_buddy.serving.admission.option_names import OUTCOME_KEY

if TYPE_CHECKING:
    import torch
    from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import Request

    from vllm_buddy.method.kv_units import KVUnits
    from vllm_buddy.serving.telemetry.families import Figures

TESTED_VLLM = ("0.29.0", "0.31.0", "0.32.0")  # the last one with all tests, the others as `make test-versions` does
_OURS = "vllm_buddy"

BlockHasher = Callable[["Request"], list[Any]]  # vLLM's: the hashes of the full blocks that have none yet

# Attention backends whose metadata can be built once per layer within a step.
SUPPORTED_ATTENTION_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")


def vllm_version() -> str:
    """vLLM's version without the local part, e.g. "0.32.0"."""
    import vllm

    return str(vllm.__version__).split("+")[0]


def why_not_attention_backend(name: str) -> str | None:
    """Why layers cannot have attention metadata of their own with this backend; None if they can.

    name: as in vLLM's AttentionBackendEnum.
    """
    if name in SUPPORTED_ATTENTION_BACKENDS:
        return None
    reason = (
        "its wrappers hold one plan at a time, and layers need one each"
        if name.startswith("FLASHINFER")
        else ("its metadata was never tried with layers of different lengths")
    )
    return f"{reason}; choose one of {', '.join(SUPPORTED_ATTENTION_BACKENDS)} with --attention-backend"


def attention_problem(attn_groups: Sequence[Sequence[Any]]) -> str | None:
    """Why a model runner's attention cannot be routed; None if it can.

    attn_groups: of the runner, by KV cache group (vllm.v1.worker.utils.AttentionGroup).
    """
    if not attn_groups or any(len(groups) != 1 for groups in attn_groups):
        names = {group.backend.get_name() for groups in attn_groups for group in groups}
        if len(names) == 1:
            return (
                "all layers, those of a drafter among them, must have KV caches of one dtype and shape; leave out "
                "--kv-cache-dtype-skip-layers"
            )
        return "it needs one attention backend for all layers"
    group = attn_groups[0][0]
    backend = group.backend.get_name()
    if reason := why_not_attention_backend(backend):
        return f"the attention backend is {backend}: {reason}"
    if getattr(group, "kernel_block_size", None) is not None:  # vLLM 0.31 and before have none
        return f"{backend} works on KV blocks of {group.kernel_block_size} tokens; set --block-size to that"
    return None


def metadata_builder(attn_groups: Sequence[Sequence[Any]]) -> "AttentionMetadataBuilder[Any]":
    """The builder of attention metadata of the first KV cache group. The layers of all groups are alike."""
    return attn_groups[0][0].get_metadata_builder(0)


def layer_metadata(builder: "AttentionMetadataBuilder[Any]", common: "CommonAttentionMetadata") -> Any:
    """Attention metadata of one layer. Metadata of several layers exists at once in a step."""
    # fast_build: otherwise FlashAttention 3 keeps its plan in one buffer per builder, which the next layer overwrites.
    return builder.build(0, common, fast_build=True)


def moved_metadata(metadata: Any, block_table: "torch.Tensor", slot_mapping: "torch.Tensor") -> Any:
    """The same attention metadata for a layer whose KV lies in other blocks.

    As FlashAttention's own `update_block_table` does. None of SUPPORTED_ATTENTION_BACKENDS derives anything from the
    two.
    """
    moved = copy(metadata)
    moved.block_table, moved.slot_mapping = block_table, slot_mapping
    return moved


def metadata_to_capture(builder: "AttentionMetadataBuilder[Any]", common: "CommonAttentionMetadata") -> Any:
    """Attention metadata for a CUDA graph, whose lengths may change between replays.

    common: on persistent buffers, with max_seq_len the longest possible.
    """
    from vllm import envs

    metadata = layer_metadata(builder, common)
    flash: Any = builder
    if not getattr(flash, "aot_schedule", False) or envs.VLLM_BATCH_INVARIANT:
        return metadata
    # FlashAttention 3 divides sequences into splits. By itself it derives their number from max_seq_len and plans them
    # before each layer. vLLM bounds the number and plans once for all layers of equal lengths, and so does this.
    splits = flash.attention_config.flash_attn_max_num_splits_for_cuda_graph
    plan = flash._get_scheduler_metadata(
        aot_schedule=True,
        batch_size=common.num_reqs,
        cu_query_lens=common.query_start_loc,
        max_query_len=common.max_query_len,
        seqlens=common.seq_lens,
        max_seq_len=common.max_seq_len,
        causal=common.causal,
        max_num_splits=splits,
    )
    return replace(metadata, scheduler_metadata=plan, max_num_splits=splits)


def runner_output(output: Any) -> Any:
    """The ModelRunnerOutput in what a model runner's sample_tokens returns.

    Under asynchronous scheduling it is wrapped until its tokens have arrived: by V1 in AsyncGPUModelRunnerOutput, by V2
    in AsyncOutput.
    """
    for attribute in ("_model_runner_output", "model_runner_output"):
        output = getattr(output, attribute, output)
    return output


def allocate_intermediate_tensors(runner: Any) -> None:
    """Allocate what a V1 model runner copies the tensors of the pipeline stage before into, where vLLM has not.

    vLLM does so in its first dummy run. On CPU there is none if layers are not compiled and the size of the KV cache is
    given, and the first step then fails. Remove when `CPUWorker.determine_available_memory` always makes one.
    """
    from vllm.distributed.parallel_state import get_pp_group

    if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


@contextmanager
def with_layers(layers: int) -> Iterator[None]:
    """Within it, vLLM's Llama, Qwen2 and Qwen3 models are made of these layers only. The others never take memory.

    layers: bit l stands for layer l. In the place of the others is vLLM's module for layers of other pipeline stages.
    """
    from vllm.model_executor.models import llama, qwen2
    from vllm.model_executor.models.utils import PPMissingLayer, make_layers

    def make(num_hidden_layers: int, layer_fn: Any, prefix: str) -> Any:
        def make_layer(prefix: str) -> Any:
            is_wanted = layers >> int(prefix.rsplit(".", 1)[1]) & 1
            return layer_fn(prefix=prefix) if is_wanted else PPMissingLayer()

        return make_layers(num_hidden_layers, make_layer, prefix)

    with patch.object(llama, "make_layers", make), patch.object(qwen2, "make_layers", make):
        yield


def units_problem() -> str | None:
    """Why this vLLM cannot have KV units; None if it can.

    Before 0.32 the coordinator does not say which tokens of a group may be cached; in 0.33 groups are made elsewhere.
    """
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator

    if hasattr(KVCacheCoordinator, "get_num_cacheable_tokens") and hasattr(kv_cache_utils, "get_kv_cache_groups"):
        return None
    return f"they work with vLLM 0.32, this is {vllm_version()}"


def groups_by_units(groups: "Sequence[KVCacheGroupSpec]", units: "KVUnits") -> "list[KVCacheGroupSpec]":
    """One KV-cache group for each unit, out of vLLM's one group of all layers.

    vLLM lets all groups use the same memory, in which the i-th layers of all groups share a place, and takes the blocks
    of all groups out of one pool.

    Raises:
        UnsupportedError: the layers are not alike, so that vLLM made several groups or sizes, or some are missing.
    """
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec, UniformTypeKVCacheSpecs

    if len(groups) != 1 or isinstance(groups[0].kv_cache_spec, UniformTypeKVCacheSpecs):
        raise UnsupportedError(
            'kv_layout "units" needs layers with KV caches of one kind and size; leave it out, or start without '
            "--kv-cache-dtype-skip-layers"
        )
    names = {extract_layer_index(name): name for name in groups[0].layer_names}
    spec = groups[0].kv_cache_spec
    if sorted(names) != list(range(units.num_layers)):
        raise UnsupportedError(
            f'kv_layout "units" needs a KV cache in each of {units.num_layers} layers, found {len(names)}; leave it out'
        )
    return [
        KVCacheGroupSpec([names[layer] for layer in units.layers_at(unit)], spec) for unit in range(units.num_units)
    ]


def replica_loads(client: Any) -> tuple[list[float], list[float]]:
    """The loads of the data-parallel replicas, and the requests that each is known to have; both [num_replicas].

    Requests that wait count twice. client: vLLM's DPLBAsyncMPClient. A replica has the greater of two numbers: its last
    report to all API servers, which is up to 0.1 s old, and what this one has in flight. Its load, as in vLLM's own
    balancer, takes the other API servers to have as much in flight; that orders replicas, and is no number of requests.
    """
    loads, num_requests = [], []
    for engine, (waiting, running, _) in zip(client.core_engines, client.lb_engines):
        in_flight = client.engine_inflight[engine]
        loads.append(max(client.client_count * in_flight, waiting + running) + waiting)
        num_requests.append(max(in_flight, waiting + running) + waiting)
    return loads, num_requests


def add_to_ready_response(response: Any, told: Any) -> dict[str, Any]:
    """What an engine says to its front ends when it is ready, with `told` added, for `told_when_ready`.

    response: vLLM's EngineCoreReadyResponse. vLLM encodes it as a map, and passes over keys that it does not know.
    """
    return {**{field.name: getattr(response, field.name) for field in fields(response)}, _OURS: told}


def told_when_ready(payload: bytes) -> tuple[int, Any] | None:
    """The data-parallel rank of an engine that is ready and what was added to its message; None if nothing was."""
    import msgspec

    message = msgspec.msgpack.decode(payload) if payload else {}
    return (message["data_parallel_rank"], message[_OURS]) if _OURS in message else None


def finished_params(freed: Any, outcome: dict[str, Any]) -> Any:
    """What Scheduler._free_request returns, with `outcome` added to the request's kv_transfer_params.

    freed: what vLLM's own method returned, (kv_transfer_params, ec_transfer_params).
    """
    kv_params, ec_params = freed
    return {**(kv_params or {}), OUTCOME_KEY: outcome}, ec_params


def add_figures(stats: "SchedulerStats", figures: "Figures") -> None:
    """Send figures with vLLM's statistics of a step.

    vLLM sends the fields of SchedulerStats and nothing else, and this is the one of any content: statistics of a KV
    connector, which routed servers do not have.
    """
    stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), _OURS: figures}


def take_figures(stats: "SchedulerStats | None") -> "Figures":
    """Remove the figures from statistics that arrived, before vLLM looks for a connector that they belong to."""
    carried = None if stats is None else stats.kv_connector_stats
    if stats is None or not carried:
        return {}
    figures = carried.pop(_OURS, {})
    stats.kv_connector_stats = carried or None
    return figures


def first_prefill(request: "Request") -> tuple[int, int] | None:
    """Length of the prompt of a request that was just scheduled, and how much of it was cached.

    None if the request was scheduled before.
    """
    stats = request.prefill_stats
    if stats is None or request.num_preemptions > 0:
        return None
    return stats.num_prompt_tokens, stats.num_cached_tokens


def rehash_blocks(request: "Request", salt: Any, hasher: BlockHasher | None = None) -> None:
    """Compute the block hashes of a request anew, with this cache_salt. vLLM hashes the prompt in the constructor.

    hasher: what `stop_hashing` took; None: the request has it.
    """
    request.cache_salt = salt
    request.block_hashes = []
    if hasher is not None:
        request._block_hasher = hasher
    request.update_block_hashes()


def stop_hashing(request: "Request", num_blocks: int) -> BlockHasher | None:
    """Keep the hashes of the first num_blocks blocks of a request and add none; returns what made them."""
    del request.block_hashes[num_blocks:]
    hasher, request._block_hasher = request._block_hasher, None
    return hasher


def ask_drafter_in_every_step(runner: Any) -> None:
    """Let a V1 model runner ask its drafter in every step: ours makes as many drafts as there is room for.

    vLLM does not ask it in a step in which one request comes within num_speculative_tokens of max_model_len. It then
    drafts token 0, as often as it may, for all requests of the batch.
    """
    runner.effective_drafter_max_model_len = runner.max_model_len + runner.num_spec_tokens


def mend_sampling_of_drafts() -> None:
    """Replace two functions of vLLM's rejection sampler that fail on CPU. Calling it again changes nothing.

    `expand_batch_to_tokens` leaves its result unset: the CPU kernel writes to a copy of a floating-point output, and
    rounds temperature and top-p to integers. With one request in the batch that is not greedy, all requests with drafts
    then get arbitrary tokens. Remove when `_expand_kernel_impl` (utils/cpu_triton_utils.py) copies its result back.

    `apply_top_k_top_p` ends the engine in a step in which a request has top-k and none has drafts. Remove when it takes
    logits of no rows.
    """
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = _expand_batch_to_tokens
    rejection_sampler.apply_top_k_top_p = _apply_top_k_top_p


def _apply_top_k_top_p(logits: "torch.Tensor", k: "torch.Tensor | None", p: "torch.Tensor | None") -> "torch.Tensor":
    """See vllm.v1.sample.ops.topk_topp_sampler.apply_top_k_top_p. logits: [num_tokens, vocab_size]."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    return apply_top_k_top_p(logits, k, p) if len(logits) else logits


def _expand_batch_to_tokens(
    x: "torch.Tensor", cu_num_tokens: "torch.Tensor", num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> "torch.Tensor":
    """See vllm.v1.sample.rejection_sampler.expand_batch_to_tokens. x: [batch_size]; returns [num_tokens]."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts, output_size=num_tokens)
    return expanded.masked_fill(expanded == replace_from, replace_to)
