"""Adapter for vLLM's model runner V1: describes its batch as a StepBatch."""

from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.forward_context import get_forward_context

from vllm_buddy.serving.worker.batch import StepBatch
from vllm_buddy.serving.worker.state import RoutedSteps, check_attention

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Base
else:
    _Base = object


class RoutedRunnerV1(_Base):
    """Mixin over a V1 model runner."""

    buddy_steps: RoutedSteps

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the plan of the step."""
        self.buddy_steps.begin(scheduler_output)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        return super()._model_forward(*args, step=self.buddy_steps.step(self._step_batch()), **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Send the layers really executed back with vLLM's output."""
        req_ids = list(self.input_batch.req_ids)
        query_start_loc = self.query_start_loc.np[: len(req_ids) + 1].copy()
        output = super().sample_tokens(*args, **kwargs)
        # Under asynchronous scheduling the output is wrapped until its tokens have arrived.
        self.buddy_steps.report(getattr(output, "_model_runner_output", output), req_ids, query_start_loc)
        return output

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Check, once the backend is known, that its metadata can be built per layer."""
        super().initialize_kv_cache(*args, **kwargs)
        check_attention(self.attn_groups)

    def buddy_attention(self) -> tuple[Any, int]:
        """The builder of attention metadata, and the size of a KV block in tokens."""
        return self.attn_groups[0][0].get_metadata_builder(), self.input_batch.block_table[0].block_size

    def _step_batch(self) -> StepBatch:
        req_ids = self.input_batch.req_ids
        num_reqs = len(req_ids)
        query_start_loc = self.query_start_loc.np[: num_reqs + 1].astype(np.int64)
        plans = self.buddy_steps.plans_of(req_ids, np.diff(query_start_loc).tolist())
        assert plans is not None  # V1 warms up without execute_model
        builder, block_size = self.buddy_attention()
        context = get_forward_context()
        layer_name = next(iter(context.attn_metadata))
        return StepBatch(
            num_layers=self.buddy_steps.num_layers,
            req_ids=req_ids,
            plans=plans,
            query_start_loc=query_start_loc,
            num_computed_tokens=self.input_batch.num_computed_tokens_cpu[:num_reqs].astype(np.int64),
            block_table=self.input_batch.block_table[0].get_device_tensor(num_reqs),
            block_size=block_size,
            slot_mapping=context.slot_mapping[layer_name],
            # fast_build: metadata of several layers is alive at once, so none may own the builder's buffers.
            build_metadata=lambda common: builder.build(0, common, fast_build=True),
            kernels=self.buddy_steps.kernels,
        )
