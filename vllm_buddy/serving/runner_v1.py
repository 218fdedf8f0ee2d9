"""Adapter for vLLM's model runner V1: from the plan and the runner's batch to a RoutedStep."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.forward_context import get_forward_context
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_buddy.errors import UnsupportedError
from vllm_buddy.serving.compat import SUPPORTED_ATTENTION_BACKENDS
from vllm_buddy.serving.kv_policy import POLICIES, KVPolicy
from vllm_buddy.serving.plan import EXECUTED_ATTRIBUTE, PLAN_ATTRIBUTE, Executed, StepPlan
from vllm_buddy.serving.routed_step import RoutedStep
from vllm_buddy.serving.startup import engine_settings
from vllm_buddy.serving.step_batch import StepBatch, check_plan

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Base
else:
    _Base = object


def _executed_by_request(
    layers: np.ndarray, req_ids: Sequence[str], query_start_loc: np.ndarray
) -> dict[str, Executed]:
    """layers: [num_tokens], executed per token of the step. query_start_loc: [num_reqs + 1]."""
    if len(layers) == len(req_ids):  # a token each
        return {req_id: Executed(1, n, n, n) for req_id, n in zip(req_ids, layers.tolist())}
    columns = [np.diff(query_start_loc)]
    columns += [ufunc.reduceat(layers, query_start_loc[:-1]) for ufunc in (np.add, np.minimum, np.maximum)]
    return {req_id: Executed(*c) for req_id, *c in zip(req_ids, *(column.tolist() for column in columns))}


class _RoutedRunner(_Base):
    """Mixin over a V1 model runner. Set up by routed_runner, since the runner exists before its class is swapped."""

    buddy_policy: KVPolicy
    buddy_plan: StepPlan
    buddy_step: RoutedStep | None
    buddy_view_seconds: float  # time spent on building views, for the benchmark

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the plan of the step, and drop the state of requests that have finished."""
        for req_id in scheduler_output.finished_req_ids:
            self.buddy_policy.forget(req_id)
        self.buddy_plan = getattr(scheduler_output, PLAN_ATTRIBUTE)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        batch = self._step_batch()
        self.buddy_step = RoutedStep(
            self.buddy_policy, self.buddy_policy.views(batch), np.zeros(batch.num_tokens, dtype=np.int32)
        )
        self.buddy_view_seconds += time.perf_counter() - started
        return super()._model_forward(*args, step=self.buddy_step, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Send the layers really executed back with vLLM's output."""
        step, batch_req_ids = self.buddy_step, list(self.input_batch.req_ids)
        query_start_loc = self.query_start_loc.np[: len(batch_req_ids) + 1].copy()
        output = super().sample_tokens(*args, **kwargs)
        if step is not None:
            self.buddy_step = None
            executed = _executed_by_request(step.executed, batch_req_ids, query_start_loc)
            # Under asynchronous scheduling the output is wrapped until its tokens have arrived.
            setattr(getattr(output, "_model_runner_output", output), EXECUTED_ATTRIBUTE, executed)
        return output

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Check, once the backend is known, that its metadata can be built per layer."""
        super().initialize_kv_cache(*args, **kwargs)
        if len(self.attn_groups) != 1 or len(self.attn_groups[0]) != 1:
            raise UnsupportedError("--model-impl buddy needs one KV cache group with one attention backend")
        backend = self.attn_groups[0][0].backend.get_name()
        if backend not in SUPPORTED_ATTENTION_BACKENDS:
            raise UnsupportedError(
                f"--model-impl buddy cannot use the attention backend {backend}; choose one of "
                f"{', '.join(SUPPORTED_ATTENTION_BACKENDS)} with --attention-backend"
            )

    def _step_batch(self) -> StepBatch:
        req_ids = self.input_batch.req_ids
        num_reqs = len(req_ids)
        query_start_loc = self.query_start_loc.np[: num_reqs + 1].astype(np.int64)
        plans = [self.buddy_plan[req_id] for req_id in req_ids]
        check_plan(plans, np.diff(query_start_loc).tolist(), req_ids)
        block_table = self.input_batch.block_table[0]
        context = get_forward_context()
        layer_name = next(iter(context.attn_metadata))
        builder = self.attn_groups[0][0].get_metadata_builder()
        return StepBatch(
            num_layers=self.buddy_policy.num_layers,
            req_ids=req_ids,
            plans=plans,
            query_start_loc=query_start_loc,
            num_computed_tokens=self.input_batch.num_computed_tokens_cpu[:num_reqs].astype(np.int64),
            block_table=block_table.get_numpy_array()[:num_reqs],
            block_size=block_table.block_size,
            slot_mapping=context.slot_mapping[layer_name],
            # fast_build: metadata of several layers is alive at once, so none may own the builder's buffers.
            build_metadata=lambda common: builder.build(0, common, fast_build=True),
        )


def routed_runner(runner: Any) -> Any:
    """Turn a V1 model runner into a routed one, in place."""
    if not isinstance(runner, GPUModelRunner):
        raise UnsupportedError("--model-impl buddy runs on vLLM's model runner V1; set VLLM_USE_V2_MODEL_RUNNER=0")
    settings = engine_settings(runner.vllm_config)
    runner.__class__ = type(f"Routed{type(runner).__name__}", (_RoutedRunner, type(runner)), {})
    runner.buddy_policy = POLICIES[settings.kv_policy](runner.model_config.hf_text_config.num_hidden_layers)
    runner.buddy_plan = {}
    runner.buddy_step = None
    runner.buddy_view_seconds = 0.0
    return runner
