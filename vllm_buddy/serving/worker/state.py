"""What a worker keeps between steps, whichever of vLLM's model runners it has.

Takes the plan of each step, turns the runner's StepBatch into what the model's forward pass runs, and sends the count
of executed layers back.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm_buddy_kernels import KERNELS, Kernels

from vllm_buddy.errors import SettingsError, UnsupportedError
from vllm_buddy.method import LayerPath, full_path
from vllm_buddy.method.kv_policy import KVPolicyName
from vllm_buddy.serving.compat import attention_problem, layer_metadata, metadata_builder, moved_metadata
from vllm_buddy.serving.forward.adapters import RoutedAdapters
from vllm_buddy.serving.forward.compiled import LayerFn
from vllm_buddy.serving.forward.eager import RoutedStep
from vllm_buddy.serving.forward.layer import try_kernels
from vllm_buddy.serving.forward.pipeline import is_here, stage_of
from vllm_buddy.serving.graphs.capture import CudaCapture, OutOfGraphMemory
from vllm_buddy.serving.graphs.decode import DecodeGraphs, GraphedStep
from vllm_buddy.serving.kv import POLICIES, KVPolicy, LayerView
from vllm_buddy.serving.schedule.plan import EXECUTED_ATTRIBUTE, PLAN_ATTRIBUTE, Executed, RequestPlan, StepPlan
from vllm_buddy.serving.start.attached import kv_units_of, limits_of
from vllm_buddy.serving.start.settings import engine_settings
from vllm_buddy.serving.worker.batch import RunPlaces, StepBatch, check_plan

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

    from vllm_buddy.serving.forward.models import RoutedBackbone

logger = init_logger(f"vllm.{__name__}")


class WorkerState:
    """The KV policy with its state, the kernels and the captured graphs of one worker.

    policy: may be replaced while no request is in flight.
    units: of the KV cache; None in the dense layout.
    block_size: of the KV cache, in tokens; 0 until attach_kv_cache.
    graphs: of decode steps; None where none are used.
    adapters: LoRA adapters of the rows of a step; None where the server has none.
    serving: whether start-up is over. From then on a step without a plan is an error, not a warm-up.
    view_seconds: time spent on views so far, for benchmarks.
    """

    def __init__(self, vllm_config: "VllmConfig") -> None:
        self._vllm_config = vllm_config
        self._settings = settings = engine_settings(vllm_config)
        self.num_layers: int = vllm_config.model_config.hf_text_config.num_hidden_layers
        self.units = kv_units_of(vllm_config.model_config)
        self.policy = self.new_policy(settings.kv)
        self._absent: LayerPath = full_path(self.num_layers) & ~limits_of(vllm_config.model_config).layers
        # Between compiled layers torch moves the rows. Slots are computed by an op of `kernels` in either case.
        self._moves_rows = None if settings.kernels is None else KERNELS[settings.kernels]
        self.kernels: Kernels = self._moves_rows or KERNELS["reference"]
        self.block_size = 0
        self.graphs: DecodeGraphs | None = None
        self.adapters: RoutedAdapters | None = None
        self.serving = False
        self.view_seconds = 0.0
        self._builder: AttentionMetadataBuilder[Any] | None = None
        self._plan: StepPlan | None = None
        self._drafting: dict[str, int] = {}  # layers executed to draft since the last step, by request
        self._step: RoutedStep | GraphedStep | None = None
        self._capture: CudaCapture | None = None

    def new_policy(self, name: KVPolicyName) -> KVPolicy:
        """A KV policy that knows of no request."""
        caching = bool(self._vllm_config.cache_config.enable_prefix_caching)
        stage = stage_of(self.num_layers)
        return POLICIES[name](self.num_layers, shares_blocks=caching, stage=stage, units=self.units)

    def attach_kv_cache(self, attn_groups: Sequence[Sequence[Any]], block_size: int) -> None:
        """Take the attention backend of a model runner and the size of its KV blocks, in tokens.

        Raises:
            UnsupportedError: metadata cannot be built per layer with this backend.
        """
        if problem := attention_problem(attn_groups):
            raise UnsupportedError(f"--model-impl buddy cannot be served: {problem}")
        self._builder, self.block_size = metadata_builder(attn_groups), block_size

    @property
    def builder(self) -> "AttentionMetadataBuilder[Any]":
        """The attention backend's builder of metadata."""
        assert self._builder is not None, "the KV cache is not initialized"
        return self._builder

    def start_serving(self, backbone: "RoutedBackbone") -> None:
        """End start-up: compile the kernels and capture the graphs, where they are wanted. Every later step must have
        a plan.
        """
        self.serving = True
        if self._moves_rows is not None:
            with torch.inference_mode():
                try_kernels(list(filter(is_here, backbone.stage)), backbone.bypasses, self._moves_rows, self.block_size)
        if self._settings.graphs.enabled:
            self.capture_graphs(backbone)

    def capture_graphs(self, backbone: "RoutedBackbone") -> None:
        """Capture the graphs of all layers, in place of those that there may be."""
        settings = self._settings.graphs
        assert settings.sizes is not None
        assert self._moves_rows is not None
        limit = settings.memory_mib << 20
        self.graphs = None
        self._capture = self._capture or CudaCapture(backbone.norm.weight.device)
        with torch.inference_mode():
            graphs = DecodeGraphs(
                backbone,
                backbone.bypasses,
                self.policy,
                kernels=self._moves_rows,
                builder=self.builder,
                block_size=self.block_size,
                vllm_config=self._vllm_config,
                sizes=settings.sizes,
                memory_limit=limit,
                capture=self._capture,
            )
            try:
                taken = graphs.capture_pieces()
            except OutOfGraphMemory as error:
                raise SettingsError(
                    f"no device memory is left to capture CUDA graphs ({error}); give fewer graphs.sizes, lower "
                    "--gpu-memory-utilization or --kv-cache-memory-bytes, or set graphs.enabled to false"
                ) from None
        logger.info(
            "vllm_buddy: CUDA graphs of each layer, for batches of %s, take %d of graphs.memory_mib %d",
            settings.sizes,
            taken >> 20,
            settings.memory_mib,
        )
        if taken > limit:
            logger.warning(
                "vllm_buddy: that is more than graphs.memory_mib allows, and leaves nothing for graphs of whole paths; "
                "raise it, or give fewer graphs.sizes"
            )
        self.graphs = graphs

    def begin(self, scheduler_output: Any, dummy_run: bool = False) -> None:
        """Take the plan of the coming step, and drop the state of finished requests.

        dummy_run: whether vLLM made the step up itself, without requests.
        """
        if dummy_run:
            self._plan = None
            return
        for req_id in scheduler_output.finished_req_ids:
            self.policy.forget(req_id)
        self._plan = getattr(scheduler_output, PLAN_ATTRIBUTE, None)
        if self._plan is None and self.serving:
            raise RuntimeError("vLLM sent a step without a plan, which would be served unrouted")

    @property
    def is_planned(self) -> bool:
        """Whether the step has a plan; a warm-up has none."""
        return self._plan is not None

    def plans_of(self, req_ids: Sequence[str], num_scheduled: Sequence[int]) -> list[RequestPlan] | None:
        """The plans of the rows of a batch, checked; None in a warm-up, which is not planned."""
        if self._plan is None:
            return None
        plans = [self._plan[req_id] for req_id in req_ids]
        check_plan(plans, num_scheduled, req_ids, self._absent)
        return plans

    def layer_metadata(self, common: "CommonAttentionMetadata") -> Any:
        """What the attention backend reads for one layer."""
        return layer_metadata(self.builder, common)

    def batch(
        self,
        *,
        req_ids: Sequence[str],
        plans: Sequence[RequestPlan],
        query_start_loc: np.ndarray,
        num_computed_tokens: np.ndarray,
        block_table: torch.Tensor,
        slot_mapping: torch.Tensor | None,
    ) -> StepBatch:
        """The StepBatch of rows of this worker, whose docstring has the shapes."""
        return StepBatch(
            num_layers=self.num_layers,
            req_ids=req_ids,
            plans=plans,
            query_start_loc=query_start_loc,
            num_computed_tokens=num_computed_tokens,
            block_table=block_table,
            block_size=self.block_size,
            slot_mapping=slot_mapping,
            build_metadata=self.layer_metadata,
            move_metadata=moved_metadata,
            kernels=self.kernels,
            units=self.units,
        )

    def step(self, batch: StepBatch) -> RoutedStep | GraphedStep:
        """What the model's forward pass runs for a batch."""
        started = time.perf_counter()
        places = self.policy.places(batch)
        graphed = None if self.graphs is None else self.graphs.step(batch, places)
        self._step = graphed or RoutedStep(
            self.policy,
            self._views(batch, places),
            np.zeros(batch.num_tokens, dtype=np.int32),
            self._moves_rows,
            self.adapters,
        )
        self.view_seconds += time.perf_counter() - started
        return self._step

    def _views(self, batch: StepBatch, places: RunPlaces) -> list[LayerView]:
        views = self.policy.views(batch, places)
        if not (self._absent and self.policy.writes_skipped):
            return views
        # Nothing is left in the cache of a layer that no path holds: nobody would read it.
        nobody = LayerView.empty()
        first = stage_of(self.num_layers).start
        return [nobody if self._absent >> layer & 1 else view for layer, view in enumerate(views, start=first)]

    def wanted_drafts(self, req_ids: Sequence[str]) -> list[tuple[int, int]]:
        """How many drafts each request should get: of n-grams, and from the model's own layers."""
        if self._plan is None:
            return [(0, 0)] * len(req_ids)
        plans = [self._plan[req_id] for req_id in req_ids]
        return [(plan.wanted_ngrams, plan.wanted_drafts) for plan in plans]

    def drafting_step(
        self,
        batch: StepBatch,
        views: Sequence[LayerView],
        bypasses: Sequence[LayerFn | None] | None = None,
        exit_adapter: LayerFn | None = None,
    ) -> RoutedStep:
        """What the model runs to draft, beside its steps. Its layers are counted apart.

        bypasses, exit_adapter: see RoutedStep.
        """
        for plan, req_id in zip(batch.plans, batch.req_ids):
            layers = sum(run.num_tokens * run.path.bit_count() for run in plan.runs)
            self._drafting[req_id] = self._drafting.get(req_id, 0) + layers
        executed = np.zeros(batch.num_tokens, dtype=np.int32)
        return RoutedStep(self.policy, views, executed, self._moves_rows, bypasses=bypasses, exit_adapter=exit_adapter)

    def report(self, output: Any, req_ids: Sequence[str], query_start_loc: np.ndarray) -> None:
        """Attach the layers executed in the last step to vLLM's output. Only for the last pipeline stage.

        output: a ModelRunnerOutput. query_start_loc: [num_reqs + 1], of the step.
        """
        if self._step is not None:
            plans = [self._plan[req_id] for req_id in req_ids] if self._plan else None
            executed = _by_request(self._step.counts(), req_ids, query_start_loc, plans)
            for req_id, layers in self._drafting.items():
                executed[req_id] = executed[req_id]._replace(drafting=layers)
            self._drafting = {}
            setattr(output, EXECUTED_ATTRIBUTE, executed)
            self._step = None


def _by_request(
    layers: np.ndarray, req_ids: Sequence[str], query_start_loc: np.ndarray, plans: Sequence[RequestPlan] | None
) -> dict[str, Executed]:
    """layers: [num_tokens], executed per token of the step. query_start_loc: [num_reqs + 1]. plans: [num_reqs]."""
    if plans is None or len(layers) == len(req_ids):  # one token each
        plans = plans or [RequestPlan((), None)] * len(req_ids)
        return {
            req_id: Executed(1, n, n, n, prompt_tokens=plan.num_prompt, prompt_total=n * plan.num_prompt)
            for req_id, n, plan in zip(req_ids, layers.tolist(), plans)
        }
    result = {}
    for req_id, start, end, plan in zip(req_ids, query_start_loc.tolist(), query_start_loc[1:].tolist(), plans):
        known, in_prompt = layers[start : end - plan.num_drafts], layers[start : start + plan.num_prompt]
        total = int(known.sum())
        in_prompt_total = total if len(in_prompt) == len(known) else int(in_prompt.sum())
        result[req_id] = Executed(
            len(known),
            total,
            int(known.min()),
            int(known.max()),
            tuple(layers[end - plan.num_drafts : end].tolist()),
            prompt_tokens=plan.num_prompt,
            prompt_total=in_prompt_total,
        )
    return result
