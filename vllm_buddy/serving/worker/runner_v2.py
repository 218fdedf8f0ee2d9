"""Adapter for vLLM's Model Runner V2: a ModelState that turns the plan into an input of the model."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.spec_decode.utils import DraftTokensHandler

from vllm_buddy.serving.compat import runner_output
from vllm_buddy.serving.worker.batch import side_by_side
from vllm_buddy.serving.worker.state import WorkerState

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as _Base
else:
    _Base = object


class BuddyModelState(DefaultModelState):
    """vLLM's state of a decoder-only model, plus the worker's own. The model names it (get_model_state_cls)."""

    def __init__(self, vllm_config: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, model, *args, **kwargs)
        self.buddy_state = WorkerState(vllm_config)
        self._block_size = 0
        self._block_table: torch.Tensor | None = None
        self._slot_mapping: torch.Tensor | None = None

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self._block_size = block_tables.block_sizes[0]

    @property
    def block_size(self) -> int:
        """Of the KV cache, in tokens; 0 before it is initialized."""
        return self._block_size

    def remove_request(self, req_id: str) -> None:
        """Forget a request. Called for preempted requests as well, which come back as new ones."""
        super().remove_request(req_id)
        self.buddy_state.policy.forget(req_id)

    def prepare_attn(
        self, input_batch: Any, cudagraph_mode: Any, block_tables: Any, slot_mappings: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """vLLM's metadata. Block table and slots are kept for prepare_inputs, which vLLM calls next.

        In steps with KV units there is none: each layer has its own (see kv/packed.py).
        """
        state = self.buddy_state
        self._block_table = side_by_side(block_tables)
        self._slot_mapping = slot_mappings[0] if state.units is None else None
        if state.units is not None and state.is_planned:
            return {}
        return super().prepare_attn(input_batch, cudagraph_mode, block_tables, slot_mappings, *args, **kwargs)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Inputs of the model: vLLM's and the step. Dummy runs have no step: all layers run for all rows."""
        inputs = super().prepare_inputs(input_batch, req_states)
        state = self.buddy_state
        plans = state.plans_of(input_batch.req_ids, input_batch.num_scheduled_tokens.tolist())
        block_table, slot_mapping = self._block_table, self._slot_mapping
        self._block_table = self._slot_mapping = None
        if plans is None or block_table is None:
            return inputs
        num_reqs, num_tokens = input_batch.num_reqs, input_batch.num_tokens
        batch = state.batch(
            req_ids=input_batch.req_ids,
            plans=plans,
            query_start_loc=input_batch.query_start_loc_np[: num_reqs + 1].astype(np.int64),
            num_computed_tokens=input_batch.num_computed_tokens_np.astype(np.int64),
            block_table=block_table[:num_reqs],
            slot_mapping=None if slot_mapping is None else slot_mapping[:num_tokens],
        )
        return {**inputs, "step": state.step(batch)}


class _KnownDrafts(DraftTokensHandler):
    """Tells the scheduler which tokens were drafted, where vLLM tells it their number only.

    vLLM does so for structured output. Here the plan of the next step depends on them.
    """

    def set_draft_tokens(self, input_batch: Any, draft_tokens: torch.Tensor) -> None:
        super().set_draft_tokens(replace(input_batch, has_structured_output_reqs=True), draft_tokens)


class RoutedRunnerV2(_Base):
    """Mixin over a V2 model runner: takes the plan from its input and adds the count of layers to its output."""

    @property
    def buddy_state(self) -> WorkerState:
        return self.model_state.buddy_state

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the plan of the step from the scheduler's output. A dummy run has none."""
        self.buddy_state.begin(scheduler_output, dummy_run=kwargs.get("dummy_run", False))
        return super().execute_model(scheduler_output, *args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Send the count of executed layers back with vLLM's output."""
        state = self.execute_model_state
        output = super().sample_tokens(*args, **kwargs)
        if state is not None and output is not None:
            batch = state.input_batch
            self.buddy_state.report(runner_output(output), batch.req_ids, batch.query_start_loc_np)
        return output

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's; from then on the scheduler gets to know the drafts."""
        super().load_model(*args, **kwargs)
        self.draft_tokens_handler: DraftTokensHandler = _KnownDrafts(self.device)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Keep what is known from now on: the attention backend and the size of a KV block."""
        super().initialize_kv_cache(*args, **kwargs)
        self.buddy_state.attach_kv_cache(self.attn_groups, self.model_state.block_size)
