"""Adapter for vLLM's model runner V1: describes its batch as a StepBatch."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_pp_group
from vllm.forward_context import get_forward_context

from vllm_buddy.serving.compat import (
    allocate_intermediate_tensors,
    ask_drafter_in_every_step,
    runner_output,
)
from vllm_buddy.serving.worker.batch import StepBatch
from vllm_buddy.serving.worker.depth_drafts import DepthDrafts
from vllm_buddy.serving.worker.state import WorkerState
from vllm_buddy.serving.worker.unit_tables import UnitTables

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Base
else:
    _Base = object


class RoutedRunnerV1(_Base):
    """Mixin over a V1 model runner."""

    buddy_state: WorkerState

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the plan of the step from the scheduler's output."""
        self.buddy_state.begin(scheduler_output)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        return super()._model_forward(*args, step=self.buddy_state.step(self._step_batch()), **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Send the count of executed layers back with vLLM's output."""
        req_ids = list(self.input_batch.req_ids)
        query_start_loc = self.query_start_loc.np[: len(req_ids) + 1].copy()
        with self._seeds_of_complete_prompts():
            output = super().sample_tokens(*args, **kwargs)
        if get_pp_group().is_last_rank:
            self.buddy_state.report(runner_output(output), req_ids, query_start_loc)
        return output

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        """Sample as vLLM does without a speculator where no request of the step has drafts.

        With one, vLLM 0.32 always calls its rejection sampler, which then gives the same, and takes a twentieth of a
        step of a small model.
        """
        if spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens):
            spec_decode_metadata = None
        return super()._sample(logits, spec_decode_metadata)

    def _get_prompt_logprobs_dict(self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        """vLLM's. With LoRA adapters one request at a time: the head is told whose adapter its rows have.

        vLLM 0.32 on a CPU takes the rows of a prompt for those of the batch's requests.
        """
        adapters = self.buddy_state.adapters
        if adapters is None:
            return super()._get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)
        found: dict[str, Any] = {}
        try:
            for req_id in self.num_prompt_logprobs.keys() & num_scheduled_tokens.keys():
                adapters.buddy_prompt = self.input_batch.req_id_to_index[req_id]
                scheduled = {req_id: num_scheduled_tokens[req_id]}
                found |= super()._get_prompt_logprobs_dict(hidden_states, scheduled)
        finally:
            adapters.buddy_prompt = None
        return found

    @contextlib.contextmanager
    def _seeds_of_complete_prompts(self) -> Iterator[None]:
        """Sample without a request's seed where its prompt is not complete: what is sampled there is thrown away.

        vLLM 0.32 samples with the request's generator, and then turns the generator back. One on a CPU cannot be turned
        back, so that a seeded request whose prompt came in chunks ended the engine.
        """
        generators = self.input_batch.generators
        discarded = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]).tolist()
        kept = {
            row: generators.pop(row) for row in discarded if row in generators and generators[row].device.type == "cpu"
        }
        try:
            yield
        finally:
            generators.update(kept)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Keep what is known from now on: the attention backend and the size of a KV block."""
        super().initialize_kv_cache(*args, **kwargs)
        if self.buddy_state.units is not None and not isinstance(self.input_batch.block_table, UnitTables):
            self.input_batch.block_table = UnitTables(self.input_batch.block_table)
        self.buddy_state.attach_kv_cache(self.attn_groups, self.input_batch.block_table[0].block_size)
        allocate_intermediate_tensors(self)
        if isinstance(drafter := getattr(self, "drafter", None), DepthDrafts):
            drafter.attach(self)
            ask_drafter_in_every_step(self)

    def _get_slot_mappings(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, by KV-cache group and by layer. Empty with KV units: each layer has its own (see kv/packed.py)."""
        return super()._get_slot_mappings(*args, **kwargs) if self.buddy_state.units is None else ({}, {})

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, by layer, and that of a speculator. Empty with KV units, likewise."""
        return super()._build_attention_metadata(*args, **kwargs) if self.buddy_state.units is None else ({}, None)

    def _tables_and_slots(self, num_reqs: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See StepBatch."""
        tables, context = self.input_batch.block_table, get_forward_context()
        if isinstance(tables, UnitTables):
            return tables.side_by_side(num_reqs), None
        return tables[0].get_device_tensor(num_reqs), context.slot_mapping[next(iter(context.attn_metadata))]

    def _step_batch(self) -> StepBatch:
        state, req_ids = self.buddy_state, self.input_batch.req_ids
        num_reqs = len(req_ids)
        query_start_loc = self.query_start_loc.np[: num_reqs + 1].astype(np.int64)
        plans = state.plans_of(req_ids, np.diff(query_start_loc).tolist())
        assert plans is not None  # V1 warms up without execute_model
        block_table, slot_mapping = self._tables_and_slots(num_reqs)
        return state.batch(
            req_ids=req_ids,
            plans=plans,
            query_start_loc=query_start_loc,
            num_computed_tokens=self.input_batch.num_computed_tokens_cpu[:num_reqs].astype(np.int64),
            block_table=block_table,
            slot_mapping=slot_mapping,
        )
