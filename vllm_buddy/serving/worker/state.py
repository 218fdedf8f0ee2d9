"""What a worker does with the plan, whichever of vLLM's model runners it has: from a StepBatch to the forward pass, and
from there to the count of layers executed."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm_buddy_kernels import KERNELS

from vllm_buddy.errors import UnsupportedError
from vllm_buddy.serving.compat import SUPPORTED_ATTENTION_BACKENDS
from vllm_buddy.serving.forward.eager import RoutedStep
from vllm_buddy.serving.forward.layer import try_kernels
from vllm_buddy.serving.graphs.cache import CudaCapture
from vllm_buddy.serving.graphs.decode import DecodeGraphs, GraphedStep
from vllm_buddy.serving.kv import POLICIES, KVPolicy
from vllm_buddy.serving.schedule.plan import EXECUTED_ATTRIBUTE, PLAN_ATTRIBUTE, Executed, StepPlan
from vllm_buddy.serving.start.hook import engine_settings
from vllm_buddy.serving.worker.batch import StepBatch, check_plan

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")

# vLLM's all-reduce keeps a record of each one ever captured, graphs that are gone included, in a buffer of 65,536.
_MOST_PATHS_OF_RANKS = 400


class RoutedSteps:
    """Kept between steps: the KV policy with its state, the kernels, the captured graphs.

    policy: may be replaced while no request is in flight.
    graphs: of decode steps; None where none are used.
    serving: whether start-up is over, so that a step without a plan is an error and not a warm-up.
    view_seconds: time spent on views, for the benchmark.
    """

    def __init__(self, vllm_config: "VllmConfig") -> None:
        self._vllm_config = vllm_config
        self._settings = settings = engine_settings(vllm_config)
        self.num_layers: int = vllm_config.model_config.hf_text_config.num_hidden_layers
        self.policy: KVPolicy = POLICIES[settings.kv_policy](
            self.num_layers, shares_blocks=bool(vllm_config.cache_config.enable_prefix_caching)
        )
        # Between compiled layers rows are moved by torch; the slots of a step are always one call of the op.
        self._moves_rows = None if settings.kernels is None else KERNELS[settings.kernels]
        self.kernels = self._moves_rows or KERNELS["reference"]
        self.graphs: DecodeGraphs | None = None
        self.serving = False
        self.view_seconds = 0.0
        self._plan: StepPlan | None = None
        self._step: RoutedStep | GraphedStep | None = None
        self._capture: CudaCapture | None = None

    def begin(self, scheduler_output: Any, dummy_run: bool = False) -> None:
        """Take the plan of the step that comes, and drop the state of requests that have finished."""
        if dummy_run:  # vLLM's own, of no request
            self._plan = None
            return
        for req_id in scheduler_output.finished_req_ids:
            self.policy.forget(req_id)
        self._plan = getattr(scheduler_output, PLAN_ATTRIBUTE, None)
        if self._plan is None and self.serving:
            raise RuntimeError("vLLM sent a step without a plan, which would be served unrouted")

    def plans_of(self, req_ids: Sequence[str], num_scheduled: Sequence[int]) -> list[Any] | None:
        """The plans of the rows of a batch, checked; None in a warm-up, which is not planned."""
        if self._plan is None:
            return None
        plans = [self._plan[req_id] for req_id in req_ids]
        check_plan(plans, num_scheduled, req_ids)
        return plans

    def start_serving(self, runner: Any) -> None:
        """Start-up is over: compile the kernels and capture the graphs, where they are wanted. From now on every step
        must have a plan.

        runner: the routed model runner, with its KV caches.
        """
        self.serving = True
        if self._moves_rows is not None:
            backbone = runner.model.model
            backbone.prepare()
            with torch.inference_mode():
                try_kernels(backbone.layers, backbone.bypasses, self._moves_rows, runner.buddy_attention()[1])
        if self._settings.cuda_graphs:
            self.capture_graphs(runner)

    def capture_graphs(self, runner: Any) -> None:
        """Capture the graphs of all layers, in place of those that there may be. runner: see start_serving."""
        settings, backbone = self._settings, runner.model.model
        assert settings.graph_sizes is not None
        assert self._moves_rows is not None
        builder, block_size = runner.buddy_attention()
        limit = settings.graph_memory_mib << 20
        self.graphs = None
        self._capture = self._capture or CudaCapture(backbone.norm.weight.device)
        with torch.inference_mode():
            graphs = DecodeGraphs(
                backbone,
                backbone.bypasses,
                self.policy,
                kernels=self._moves_rows,
                builder=builder,
                block_size=block_size,
                vllm_config=self._vllm_config,
                sizes=settings.graph_sizes,
                memory_limit=limit,
                capture=self._capture,
            )
            taken = graphs.capture_pieces()
        if self._vllm_config.parallel_config.tensor_parallel_size > 1:
            graphs.paths.captures_left = _MOST_PATHS_OF_RANKS
        logger.info(
            "vllm_buddy: CUDA graphs of each layer, for batches of %s, take %d of graph_memory_mib %d",
            settings.graph_sizes,
            taken >> 20,
            settings.graph_memory_mib,
        )
        if taken > limit:
            logger.warning(
                "vllm_buddy: that is more than graph_memory_mib allows, and nothing is left for graphs of whole paths; "
                "give more, or fewer graph_sizes"
            )
        self.graphs = graphs

    def step(self, batch: StepBatch) -> RoutedStep | GraphedStep:
        """What the model's forward pass runs."""
        started = time.perf_counter()
        places = self.policy.places(batch)
        graphed = None if self.graphs is None else self.graphs.step(batch, places)
        self._step = graphed or RoutedStep(
            self.policy, self.policy.views(batch, places), np.zeros(batch.num_tokens, dtype=np.int32), self._moves_rows
        )
        self.view_seconds += time.perf_counter() - started
        return self._step

    def report(self, output: Any, req_ids: Sequence[str], query_start_loc: np.ndarray) -> None:
        """Send the layers really executed in the last step back with vLLM's output.

        output: a ModelRunnerOutput. query_start_loc: [num_reqs + 1], of the step.
        """
        if self._step is not None:
            setattr(output, EXECUTED_ATTRIBUTE, _by_request(self._step.executed, req_ids, query_start_loc))
            self._step = None


def check_attention(attn_groups: Sequence[Sequence[Any]]) -> None:
    """Refuse a backend whose metadata cannot be built per layer. attn_groups: of the model runner."""
    if len(attn_groups) != 1 or len(attn_groups[0]) != 1:
        raise UnsupportedError("--model-impl buddy needs one KV cache group with one attention backend")
    group = attn_groups[0][0]
    backend = group.backend.get_name()
    if backend not in SUPPORTED_ATTENTION_BACKENDS:
        raise UnsupportedError(
            f"--model-impl buddy cannot use the attention backend {backend}; choose one of "
            f"{', '.join(SUPPORTED_ATTENTION_BACKENDS)} with --attention-backend"
        )
    if group.kernel_block_size is not None:
        raise UnsupportedError(
            f"--model-impl buddy needs KV blocks of the size that {backend} works with, {group.kernel_block_size}; "
            "set --block-size to it"
        )


def _by_request(layers: np.ndarray, req_ids: Sequence[str], query_start_loc: np.ndarray) -> dict[str, Executed]:
    """layers: [num_tokens], executed per token of the step. query_start_loc: [num_reqs + 1]."""
    if len(layers) == len(req_ids):  # a token each
        return {req_id: Executed(1, n, n, n) for req_id, n in zip(req_ids, layers.tolist())}
    columns = [np.diff(query_start_loc)]
    columns += [ufunc.reduceat(layers, query_start_loc[:-1]) for ufunc in (np.add, np.minimum, np.maximum)]
    return {req_id: Executed(*c) for req_id, *c in zip(req_ids, *(column.tolist() for column in columns))}
