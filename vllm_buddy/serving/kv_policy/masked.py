"""`masked`: a skipped layer leaves no entry, so later tokens of that layer do not attend to the position.

Packed layout: in layer l the cache of a request holds only the tokens that executed l, contiguous in its ordinary
block table. RoPE is already in K and order is kept, so causal attention over that layer's own length is attention
masked by validity, on every stock backend. Validity is the per-request, per-layer length.

Blocks may be shared through the prefix cache as long as all their tokens ran one path P. A layer outside P is empty
in them, for every request that shares them; so when a request leaves P, such a layer starts in the first block that
is the request's own, not at the start of the block table, where sharers would overwrite each other.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_buddy.method import Path
from vllm_buddy.method.path import path_mask
from vllm_buddy.serving.kv_policy.base import KVPolicy, LayerView
from vllm_buddy.serving.plan import RequestPlan
from vllm_buddy.serving.step_batch import StepBatch

_INITIAL_SLOTS = 64


@dataclass
class _LastStep:
    """The step before, for the common case that a step repeats it: the same requests decode on along their paths."""

    req_ids: list[str]
    plans: list[RequestPlan]
    slots: np.ndarray
    mask: np.ndarray  # [num_reqs, num_layers], 1 where the request runs the layer
    views: list[LayerView]

    @classmethod
    def none(cls) -> "_LastStep":
        return cls([], [], np.empty(0, dtype=np.int64), np.empty((0, 0), dtype=np.int32), [])

    def repeats(self, batch: StepBatch) -> bool:
        """Whether `batch` is the next token of every request, along the same paths, and its views are these.

        So they are if each layer holds either all tokens of the requests that run it or is run by nobody: views with
        lengths and slots of their own are of one step only.
        """
        return (
            batch.num_tokens == len(self.req_ids) > 0
            and batch.plans == self.plans
            and batch.req_ids == self.req_ids
            and all(view.attn_metadata is None for view in self.views)
            and all(plan.cached_path is None for plan in self.plans)
        )


class Masked(KVPolicy):
    """State per request: tokens held by each layer, and the block each layer starts in."""

    name: ClassVar[str] = "masked"

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self._slot: dict[str, int] = {}
        self._free = list(range(_INITIAL_SLOTS))
        self._lens = np.zeros((_INITIAL_SLOTS, num_layers), dtype=np.int32)
        self._first_block = np.zeros((_INITIAL_SLOTS, num_layers), dtype=np.int32)
        self._num_tokens = np.zeros(_INITIAL_SLOTS, dtype=np.int64)
        # The path of all tokens so far, per slot; None once it has changed.
        self._uniform: list[Path | None] = [None] * _INITIAL_SLOTS
        self._last = _LastStep.none()

    def forget(self, req_id: str) -> None:
        slot = self._slot.pop(req_id, None)
        if slot is not None:
            self._free.append(slot)
            self._last = _LastStep.none()

    def layer_lengths(self, req_id: str) -> np.ndarray:
        """[num_layers], tokens that each layer holds of a request."""
        return self._lens[self._slot[req_id]].copy()

    def views(self, batch: StepBatch) -> list[LayerView]:
        if self._last.repeats(batch) and np.array_equal(self._num_tokens[self._last.slots], batch.num_computed_tokens):
            slots = self._last.slots
            self._lens[slots] += self._last.mask
            self._num_tokens[slots] += 1
            return self._last.views
        slots = np.array([self._enter(batch, row) for row in range(len(batch.req_ids))])
        first_run = np.flatnonzero(np.diff(batch.run_request, prepend=-1))
        count = np.add.reduceat(batch.run_mask * batch.run_length[:, None], first_run, axis=0)
        before = self._lens[slots]
        first_block = self._first_block[slots]
        self._lens[slots] = before + count.astype(np.int32)
        self._num_tokens[slots] += np.diff(batch.query_start_loc)
        runs_it = count > 0
        # Layers with the same rows, lengths and first blocks share one view.
        keys = np.concatenate([batch.run_mask, before * runs_it, first_block * runs_it], axis=0, dtype=np.int32).T
        views: dict[bytes, LayerView] = {}
        result = []
        for layer, key in enumerate(map(bytes, np.ascontiguousarray(keys))):
            if key not in views:
                views[key] = self._view(batch, layer, count[:, layer], before[:, layer], first_block[:, layer])
            result.append(views[key])
        self._last = _LastStep(list(batch.req_ids), list(batch.plans), slots, (count > 0).astype(np.int32), result)
        return result

    def _view(
        self, batch: StepBatch, layer: int, count: np.ndarray, before: np.ndarray, first_block: np.ndarray
    ) -> LayerView:
        runs = batch.run_mask[:, layer]
        all_rows = bool(runs.all())
        if all_rows and not first_block.any() and np.array_equal(before, batch.num_computed_tokens):
            return LayerView()  # every token so far executed it: vLLM's own metadata is right
        rows = batch.token_rows(runs)
        if len(rows) == 0:
            return LayerView(rows_np=rows)
        reqs = np.flatnonzero(count)
        count, before, first_block = count[reqs], before[reqs], first_block[reqs]
        start = np.cumsum(count) - count
        row_of_token = np.repeat(reqs, count)
        position = np.arange(len(rows)) + np.repeat(before - start, count)
        block = batch.block_table[row_of_token, np.repeat(first_block, count) + position // batch.block_size]
        slot_mapping = batch.to_device(block.astype(np.int64) * batch.block_size + position % batch.block_size)
        seq_lens = before + count
        metadata = batch.metadata(count, seq_lens, self._tables(batch, reqs, first_block, seq_lens), slot_mapping)
        if all_rows:
            return LayerView(attn_metadata=metadata, slot_mapping=slot_mapping)
        return LayerView(rows, batch.to_device(rows), metadata, slot_mapping)

    @staticmethod
    def _tables(batch: StepBatch, reqs: np.ndarray, first_block: np.ndarray, seq_lens: np.ndarray) -> np.ndarray:
        """[len(reqs), blocks needed]: each request's block table from its first block on."""
        num_blocks = int(-(-seq_lens.max() // batch.block_size))
        if not first_block.any():
            return batch.block_table[reqs, :num_blocks]
        columns = first_block[:, None] + np.arange(num_blocks)
        return batch.block_table[reqs[:, None], np.minimum(columns, batch.block_table.shape[1] - 1)]

    def _enter(self, batch: StepBatch, row: int) -> int:
        """Slot of the request in `row`, its state checked against the plan and made ready for the step."""
        req_id, plan = batch.req_ids[row], batch.plans[row]
        num_computed = int(batch.num_computed_tokens[row])
        slot = self._slot.get(req_id)
        if slot is None:
            slot = self._slot[req_id] = self._new_slot()
        if plan.cached_path is not None:
            self._lens[slot] = path_mask(plan.cached_path, self.num_layers) * num_computed
            self._first_block[slot] = 0
            self._num_tokens[slot] = num_computed
            self._uniform[slot] = plan.cached_path
        elif self._num_tokens[slot] != num_computed:
            raise RuntimeError(
                f"request {req_id}: the KV cache holds {self._num_tokens[slot]} tokens, the plan continues at "
                f"{num_computed}"
            )
        uniform = self._uniform[slot]
        if uniform is not None:
            position = num_computed
            for run in plan.runs:
                if run.path != uniform:
                    outside = ~path_mask(uniform, self.num_layers)
                    self._first_block[slot, outside] = position // batch.block_size
                    self._uniform[slot] = None
                    break
                position += run.num_tokens
        return slot

    def _new_slot(self) -> int:
        if not self._free:
            size = len(self._num_tokens)
            self._free = list(range(size, 2 * size))
            self._lens = np.concatenate([self._lens, np.zeros_like(self._lens)])
            self._first_block = np.concatenate([self._first_block, np.zeros_like(self._first_block)])
            self._num_tokens = np.concatenate([self._num_tokens, np.zeros_like(self._num_tokens)])
            self._uniform += [None] * size
        return self._free.pop()
