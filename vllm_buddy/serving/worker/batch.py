"""One step of a worker, described alike by both model runners. KV policies and graphs work on this description."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm_buddy_kernels import Kernels

from vllm_buddy.method.kv_units import KVUnits
from vllm_buddy.method.path import LayerPath, path_mask
from vllm_buddy.serving.schedule.plan import RequestPlan

_BLOCKS_STEP = 16


@dataclass(frozen=True)
class RunPlaces:
    """Where the runs of a step write their K and V, in some or all layers.

    Positions count what a layer's cache holds of a request. They lie in the request's block table from the entry
    `first_block` on. With KV units, the block table is those of all units side by side.

    first_position: [num_layers, num_runs] int32, the position of each run's first token; -1: the run writes nothing.
    first_block: [num_layers, num_runs] int32; None: 0 everywhere.
    """

    first_position: np.ndarray
    first_block: np.ndarray | None = None

    def of(self, layers: Sequence[int] | slice) -> "RunPlaces":
        """The places in some of the layers."""
        first_block = None if self.first_block is None else self.first_block[layers]
        return RunPlaces(self.first_position[layers], first_block)


@dataclass
class StepBatch:
    """The rows of one step. All is on the host, except for the block table and the slots, which are on the device.

    req_ids: [num_reqs], in row order.
    query_start_loc: [num_reqs + 1]; tokens of request i are rows query_start_loc[i] to query_start_loc[i + 1].
    num_computed_tokens: [num_reqs], tokens in the KV cache before this step.
    block_table: [num_reqs, max_num_blocks], int32, blocks of block_size tokens. With KV units: [num_reqs, num_units *
        max_num_blocks], one table behind the other.
    slot_mapping: [num_tokens], the slots of vLLM's own metadata, one per position; None with KV units, where vLLM makes
        neither.
    build_metadata: makes what the attention backend reads of CommonAttentionMetadata. move_metadata: makes the same for
        another block table and other slots.
    kernels: Triton's, or their references.
    units: of the KV cache; None in the dense layout.
    """

    num_layers: int
    req_ids: Sequence[str]
    plans: Sequence[RequestPlan]
    query_start_loc: np.ndarray
    num_computed_tokens: np.ndarray
    block_table: torch.Tensor
    block_size: int
    slot_mapping: torch.Tensor | None
    build_metadata: Callable[[CommonAttentionMetadata], Any]
    move_metadata: Callable[[Any, torch.Tensor, torch.Tensor], Any]
    kernels: Kernels
    units: KVUnits | None = None

    @property
    def device(self) -> torch.device:
        return self.block_table.device

    @property
    def num_tokens(self) -> int:
        return int(self.query_start_loc[-1])

    @cached_property
    def table_width(self) -> int:
        """Entries of the block table of one unit."""
        return self.block_table.shape[1] // (1 if self.units is None else self.units.num_units)

    @cached_property
    def run_request(self) -> np.ndarray:
        """[num_runs], the row of the request that each run belongs to."""
        return np.repeat(np.arange(len(self.plans)), [len(plan.runs) for plan in self.plans])

    @cached_property
    def first_run(self) -> np.ndarray:
        """[num_reqs], the first run of each request."""
        return np.flatnonzero(np.diff(self.run_request, prepend=-1))

    @cached_property
    def run_length(self) -> np.ndarray:
        """[num_runs], tokens in each run."""
        return np.array([run.num_tokens for plan in self.plans for run in plan.runs], dtype=np.int64)

    @cached_property
    def run_start(self) -> np.ndarray:
        """[num_runs], first token row of each run."""
        return np.cumsum(self.run_length) - self.run_length

    @cached_property
    def run_position(self) -> np.ndarray:
        """[num_runs], position of each run's first token within its request."""
        starts_at = self.num_computed_tokens - self.query_start_loc[:-1]
        return starts_at[self.run_request] + self.run_start

    @cached_property
    def run_mask(self) -> np.ndarray:
        """[num_runs, num_layers], bool: does the run execute the layer?"""
        return np.stack([path_mask(run.path, self.num_layers) for plan in self.plans for run in plan.runs])

    def token_rows(self, runs: np.ndarray) -> np.ndarray:
        """Token rows of the chosen runs, ascending. runs: [num_runs], bool."""
        return np.flatnonzero(np.repeat(runs, self.run_length))

    @cached_property
    def _runs_on_device(self) -> Sequence[torch.Tensor]:
        """token_run, run_request and run_start as the op layer_slots takes them, in one copy."""
        num_runs, num_tokens = len(self.run_request), self.num_tokens
        runs = np.empty(num_tokens + 2 * num_runs + 1, dtype=np.int32)
        runs[:num_tokens] = np.repeat(np.arange(num_runs), self.run_length)
        runs[num_tokens:-1] = np.concatenate([self.run_request, self.run_start])
        runs[-1] = num_tokens
        return self.to_device(runs).split([num_tokens, num_runs, num_runs + 1])

    def layer_slots(self, places: RunPlaces) -> torch.Tensor:
        """[num_layers, num_tokens], the slots of `places`; -1 where a run writes nothing."""
        num_layers, num_runs = places.first_position.shape
        token_run, run_request, run_start = self._runs_on_device
        slots = torch.empty(num_layers, self.num_tokens, dtype=torch.int64, device=self.device)
        self.kernels.layer_slots(
            self.block_table,
            token_run,
            run_request,
            run_start,
            self.to_device(places.first_position),
            None if places.first_block is None else self.to_device(places.first_block),
            self.block_size,
            0,
            slots,
            torch.empty(num_layers, num_runs, dtype=torch.int32, device=self.device),  # known on the host
        )
        return slots

    def tables(self, reqs: np.ndarray | None, most_tokens: int, first_block: np.ndarray | None = None) -> torch.Tensor:
        """Block tables from their first blocks on: [num_rows, blocks of most_tokens or more], int32.

        reqs: rows, ascending; None: all. first_block: [num_rows]; None: 0 everywhere.
        """
        # In steps of _BLOCKS_STEP: Triton's attention is compiled for each divisor of the table's width.
        num_blocks = min(-(-most_tokens // (_BLOCKS_STEP * self.block_size)) * _BLOCKS_STEP, self.table_width)
        start = 0 if first_block is None else int(first_block[0])
        if first_block is None or (start % self.table_width == 0 and (first_block == start).all()):
            table = self.block_table[:, start : start + num_blocks]
            return table if reqs is None else table.index_select(0, self.to_device(reqs))
        columns = np.minimum(first_block[:, None] + np.arange(num_blocks), self.block_table.shape[1] - 1)
        if reqs is None:
            return self.block_table.gather(1, self.to_device(columns))
        return self.block_table[self.to_device(reqs)[:, None], self.to_device(columns)]

    def metadata(
        self,
        query_lens: np.ndarray,
        seq_lens: np.ndarray,
        block_table: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> Any:
        """Attention metadata for sequences of this batch.

        query_lens, seq_lens: [num_seqs], tokens to compute and tokens to attend to, the computed ones included.
        block_table: [num_seqs, any]. slot_mapping: [sum(query_lens)].
        """
        query_start_loc = np.zeros(len(query_lens) + 1, dtype=np.int32)
        np.cumsum(query_lens, out=query_start_loc[1:])
        return self.build_metadata(
            CommonAttentionMetadata(
                query_start_loc=self.to_device(query_start_loc),
                query_start_loc_cpu=torch.from_numpy(query_start_loc),
                seq_lens=self.to_device(seq_lens.astype(np.int32, copy=False)),
                num_reqs=len(query_lens),
                num_actual_tokens=int(query_start_loc[-1]),
                max_query_len=int(query_lens.max()),
                max_seq_len=int(seq_lens.max()),
                block_table_tensor=block_table,
                slot_mapping=slot_mapping,
                causal=True,
            )
        )

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """The array as a tensor on the device, without waiting for the copy."""
        if self.device.type == "cpu":
            return torch.from_numpy(np.ascontiguousarray(array))
        return async_tensor_h2d(np.ascontiguousarray(array), device=self.device)


def check_plan(
    plans: Sequence[RequestPlan], num_scheduled: Sequence[int], req_ids: Sequence[str], absent: LayerPath = 0
) -> None:
    """Raise RuntimeError unless every scheduled token has a path: wrong tokens would be served silently.

    absent: layers that are not loaded, which no path may hold.
    """
    for plan, num_tokens, req_id in zip(plans, num_scheduled, req_ids, strict=True):
        if absent and any(run.path & absent for run in plan.runs):
            raise RuntimeError(f"request {req_id}: a path holds layers that are not loaded")
        lengths = [run.num_tokens for run in plan.runs]
        if sum(lengths) != num_tokens or min(lengths) < 1:
            raise RuntimeError(f"request {req_id}: {num_tokens} tokens scheduled, runs of {lengths} tokens planned")


def side_by_side(tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """The block tables of all KV-cache groups as one. tables: of equal shapes, [num_reqs, max_num_blocks]."""
    return tables[0] if len(tables) == 1 else torch.cat(list(tables), dim=1)
