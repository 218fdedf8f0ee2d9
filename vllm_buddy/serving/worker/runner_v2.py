"""Adapter for vLLM's Model Runner V2: a ModelState that turns the plan into an input of the model."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_buddy.serving.worker.batch import StepBatch
from vllm_buddy.serving.worker.state import RoutedSteps, check_attention

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as _Base
else:
    _Base = object


class BuddyModelState(DefaultModelState):
    """vLLM's state of a decoder-only model, with the routed steps. The model names it (get_model_state_cls)."""

    def __init__(self, vllm_config: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, model, *args, **kwargs)
        self.steps = RoutedSteps(vllm_config)
        self.block_size = 0  # of the KV cache, in tokens
        self._attention: tuple[torch.Tensor, torch.Tensor, Any] | None = None

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.block_size = block_tables.block_sizes[0]

    def remove_request(self, req_id: str) -> None:
        """Called for preempted requests as well, which come back as new ones."""
        super().remove_request(req_id)
        self.steps.policy.forget(req_id)

    def prepare_attn(
        self, input_batch: Any, cudagraph_mode: Any, block_tables: Any, slot_mappings: Any, attn_groups: Any,
        *args: Any, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """vLLM's metadata; what it is made of is kept for prepare_inputs, which vLLM calls next."""
        self._attention = block_tables[0], slot_mappings[0], attn_groups[0][0].get_metadata_builder(0)
        return super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, *args, **kwargs
        )

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Inputs of the model: vLLM's and the step. No step in dummy runs: all layers, all rows."""
        inputs = super().prepare_inputs(input_batch, req_states)
        plans = self.steps.plans_of(input_batch.req_ids, input_batch.num_scheduled_tokens.tolist())
        attention, self._attention = self._attention, None
        if plans is None or attention is None:
            return inputs
        block_table, slot_mapping, builder = attention
        num_reqs, num_tokens = input_batch.num_reqs, input_batch.num_tokens
        batch = StepBatch(
            num_layers=self.steps.num_layers,
            req_ids=input_batch.req_ids,
            plans=plans,
            query_start_loc=input_batch.query_start_loc_np[: num_reqs + 1].astype(np.int64),
            num_computed_tokens=input_batch.num_computed_tokens_np.astype(np.int64),
            block_table=block_table[:num_reqs],
            block_size=self.block_size,
            slot_mapping=slot_mapping[:num_tokens],
            # fast_build: metadata of several layers is alive at once, so none may own the builder's buffers.
            build_metadata=lambda common: builder.build(0, common, fast_build=True),
            kernels=self.steps.kernels,
        )
        return {**inputs, "step": self.steps.step(batch)}


class RoutedRunnerV2(_Base):
    """Mixin over a V2 model runner: the plan comes and the count goes with what it gets and gives."""

    @property
    def buddy_steps(self) -> RoutedSteps:
        return self.model_state.steps

    def buddy_attention(self) -> tuple[Any, int]:
        """The builder of attention metadata, and the size of a KV block in tokens."""
        return self.attn_groups[0][0].get_metadata_builder(0), self.model_state.block_size

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the plan of the step. A dummy run has none."""
        self.buddy_steps.begin(scheduler_output, dummy_run=kwargs.get("dummy_run", False))
        return super().execute_model(scheduler_output, *args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Send the layers really executed back with vLLM's output, which is wrapped until its tokens have arrived."""
        state = self.execute_model_state
        output = super().sample_tokens(*args, **kwargs)
        if state is not None and output is not None:
            batch = state.input_batch
            self.buddy_steps.report(output.model_runner_output, batch.req_ids, batch.query_start_loc_np)
        return output

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Check, once the backend is known, that its metadata can be built per layer."""
        super().initialize_kv_cache(*args, **kwargs)
        check_attention(self.attn_groups)
