"""One step of a worker, as both model runners describe it. Nothing behind it knows which runner ran."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_buddy.method.path import path_mask
from vllm_buddy.serving.plan import RequestPlan


@dataclass
class StepBatch:
    """The rows of one step. All arrays are host arrays; only `block_table` has the runner's layout.

    req_ids: [num_reqs], in row order.
    query_start_loc: [num_reqs + 1]; tokens of request i are rows query_start_loc[i] to query_start_loc[i + 1].
    num_computed_tokens: [num_reqs], tokens in the KV cache before this step.
    block_table: [num_reqs, max_num_blocks], int32, blocks of block_size tokens.
    slot_mapping: [num_tokens], the position-aligned slots of vLLM's own metadata, on the device.
    build_metadata: from CommonAttentionMetadata to what the attention backend reads.
    """

    num_layers: int
    req_ids: Sequence[str]
    plans: Sequence[RequestPlan]
    query_start_loc: np.ndarray
    num_computed_tokens: np.ndarray
    block_table: np.ndarray
    block_size: int
    slot_mapping: torch.Tensor
    build_metadata: Callable[[CommonAttentionMetadata], Any]

    @property
    def device(self) -> torch.device:
        return self.slot_mapping.device

    @property
    def num_tokens(self) -> int:
        return int(self.query_start_loc[-1])

    @cached_property
    def run_request(self) -> np.ndarray:
        """[num_runs], the row of the request each run belongs to."""
        return np.repeat(np.arange(len(self.plans)), [len(plan.runs) for plan in self.plans])

    @cached_property
    def run_length(self) -> np.ndarray:
        """[num_runs], tokens in each run."""
        return np.array([run.num_tokens for plan in self.plans for run in plan.runs], dtype=np.int64)

    @cached_property
    def run_start(self) -> np.ndarray:
        """[num_runs], first token row of each run."""
        return np.cumsum(self.run_length) - self.run_length

    @cached_property
    def run_mask(self) -> np.ndarray:
        """[num_runs, num_layers], bool: does the run execute the layer?"""
        return np.stack([path_mask(run.path, self.num_layers) for plan in self.plans for run in plan.runs])

    def token_rows(self, runs: np.ndarray) -> np.ndarray:
        """Rows of the tokens of `runs`, ascending. runs: [num_runs], bool."""
        return np.flatnonzero(np.repeat(runs, self.run_length))

    def metadata(
        self,
        query_lens: np.ndarray,
        seq_lens: np.ndarray,
        block_table: np.ndarray,
        slot_mapping: torch.Tensor,
    ) -> Any:
        """Attention metadata for sequences of this batch.

        query_lens, seq_lens: [num_seqs], tokens to compute and tokens to attend to, the computed ones included.
        block_table: [num_seqs, any]. slot_mapping: [sum(query_lens)].
        """
        query_start_loc = np.zeros(len(query_lens) + 1, dtype=np.int32)
        np.cumsum(query_lens, out=query_start_loc[1:])
        query_start_loc_cpu = torch.from_numpy(query_start_loc)
        return self.build_metadata(
            CommonAttentionMetadata(
                query_start_loc=query_start_loc_cpu.to(self.device, non_blocking=True),
                query_start_loc_cpu=query_start_loc_cpu,
                seq_lens=self.to_device(seq_lens.astype(np.int32, copy=False)),
                num_reqs=len(query_lens),
                num_actual_tokens=int(query_start_loc[-1]),
                max_query_len=int(query_lens.max()),
                max_seq_len=int(seq_lens.max()),
                block_table_tensor=self.to_device(block_table),
                slot_mapping=slot_mapping,
                causal=True,
            )
        )

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """The array as a tensor where the model runs."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def check_plan(plans: Sequence[RequestPlan], num_scheduled: Sequence[int], req_ids: Sequence[str]) -> None:
    """Every scheduled token has a path. Anything else is a bug, and would serve wrong tokens silently."""
    for plan, num_tokens, req_id in zip(plans, num_scheduled, req_ids, strict=True):
        planned = sum(run.num_tokens for run in plan.runs)
        if planned != num_tokens:
            raise RuntimeError(f"request {req_id}: {num_tokens} tokens scheduled, {planned} planned")
