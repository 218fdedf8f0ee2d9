"""`masked`: a skipped layer leaves no entry, so later tokens do not attend to the position in that layer.

The layout is packed (packed.py): which positions are valid in a layer follows from one length per request and layer,
which is kept here.

Blocks may be shared through the prefix cache as long as all their tokens ran one path P. A layer outside P is empty in
them, for every request that shares them. So when a request leaves P, such a layer starts in the first block that
belongs to the request alone, not at the start of the block table, where sharers would overwrite each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from vllm_buddy.method import LayerPath, Run
from vllm_buddy.method.kv_policy import MASKED, KVPolicyName
from vllm_buddy.method.kv_units import KVUnits
from vllm_buddy.method.path import path_mask
from vllm_buddy.serving.kv.base import KVPolicy, LayerView
from vllm_buddy.serving.kv.packed import PackedViews, next_views, packed_views
from vllm_buddy.serving.schedule.plan import RequestPlan
from vllm_buddy.serving.worker.batch import RunPlaces, StepBatch

_INITIAL_SLOTS = 64


@dataclass
class _LastStep:
    """The previous step, for the common case that a step repeats it: the same requests decode on along their paths."""

    req_ids: list[str]
    plans: list[RequestPlan]
    slots: np.ndarray
    has_drafts: bool = False
    mask: np.ndarray | None = None  # [num_runs, num_layers] int32, 1 where the run executes the layer
    places: RunPlaces | None = None
    views: PackedViews | None = None

    @classmethod
    def none(cls) -> "_LastStep":
        return cls([], [], np.empty(0, dtype=np.int64))

    def repeated_by(self, batch: StepBatch) -> bool:
        """Whether `batch` continues the same requests along the same paths."""
        return (
            len(self.req_ids) > 0
            and not self.has_drafts
            and batch.plans == self.plans
            and batch.req_ids == self.req_ids
            and all(plan.cached_path is None for plan in self.plans)
        )

    def next_views(self, batch: StepBatch) -> PackedViews | None:
        """The views of `batch`, which repeats the step, where they follow from its views; else None."""
        if self.views is None or batch.num_tokens != len(self.req_ids):
            return None
        return next_views(batch, self.views)


class _Left(NamedTuple):
    """The path that all tokens of a request ran before `position`."""

    path: LayerPath
    position: int


class _Drafted(NamedTuple):
    """A step with drafts, which may be taken back. left: the first path, if the request left it in the step."""

    plan: RequestPlan
    left: _Left | None


class Masked(KVPolicy):
    """Keeps, per request and layer, the number of tokens held and the block in which the layer starts."""

    name: ClassVar[KVPolicyName] = MASKED
    writes_skipped: ClassVar[bool] = False
    in_graphs: ClassVar[bool] = True

    def __init__(
        self,
        num_layers: int,
        shares_blocks: bool = True,
        stage: slice = slice(None),
        units: KVUnits | None = None,
    ) -> None:
        super().__init__(num_layers, shares_blocks, stage, units)
        self._slot: dict[str, int] = {}
        self._free = list(range(_INITIAL_SLOTS))
        self._lens = np.zeros((_INITIAL_SLOTS, num_layers), dtype=np.int32)
        self._first_block = np.zeros((_INITIAL_SLOTS, num_layers), dtype=np.int32)  # see RunPlaces
        self._num_tokens = np.zeros(_INITIAL_SLOTS, dtype=np.int64)
        # The path of all tokens so far, per slot; None once it has changed.
        self._uniform: list[LayerPath | None] = [None] * _INITIAL_SLOTS
        self._drafted: dict[int, _Drafted] = {}  # by slot, if the last step had drafts
        self._last = _LastStep.none()
        self._repeated = False  # whether the present step repeats the last one

    @property
    def moves_first_blocks(self) -> bool:
        return self.shares_blocks or self.units is not None

    def forget(self, req_id: str) -> None:
        slot = self._slot.pop(req_id, None)
        if slot is not None:
            self._free.append(slot)
            self._drafted.pop(slot, None)
            self._last = _LastStep.none()

    def layer_lengths(self, req_id: str) -> np.ndarray:
        """[num_layers], the number of a request's tokens that each layer holds."""
        return self._lens[self._slot[req_id]].copy()

    def places(self, batch: StepBatch) -> RunPlaces:
        self._repeated = self._last.repeated_by(batch) and np.array_equal(
            self._num_tokens[self._last.slots], batch.num_computed_tokens
        )
        if not self._repeated:
            slots = np.array([self._enter(batch, row) for row in range(len(batch.req_ids))], dtype=np.int64)
            has_drafts = any(plan.num_drafts for plan in batch.plans)
            self._last = _LastStep(list(batch.req_ids), list(batch.plans), slots, has_drafts)
        last, slots = self._last, self._last.slots
        if self._repeated and batch.num_tokens == len(slots):  # a decode step: one token more or none in each layer
            assert last.mask is not None
            assert last.places is not None
            self._lens[slots] += last.mask
            self._num_tokens[slots] += 1
            last.places = RunPlaces(last.places.first_position + last.mask.T, last.places.first_block)
            return last.places
        held, first_block = self._lens[slots], self._first_block[slots]
        count = batch.run_mask * batch.run_length[:, None].astype(np.int32)
        before = held
        if len(count) > len(slots):  # a request has several runs: each starts after the ones before it
            behind = np.cumsum(count, axis=0, dtype=np.int32) - count
            before = held[batch.run_request] + behind - behind[batch.first_run][batch.run_request]
            first_block = first_block[batch.run_request]
            count = np.add.reduceat(count, batch.first_run, axis=0)
        self._lens[slots] = held + count
        self._num_tokens[slots] += np.diff(batch.query_start_loc)
        last.mask = batch.run_mask.astype(np.int32)
        moved = self.units is not None or first_block.any()
        last.places = RunPlaces(np.where(batch.run_mask, before, -1).T, first_block.T if moved else None)
        return last.places

    def views(self, batch: StepBatch, places: RunPlaces) -> list[LayerView]:
        following = self._last.next_views(batch) if self._repeated else None
        self._last.views = following or packed_views(batch, places.of(self.stage))
        return self._last.views.views

    def _enter(self, batch: StepBatch, row: int) -> int:
        """Index of the state of the request in `row`, checked against the plan and prepared for the step."""
        req_id, plan = batch.req_ids[row], batch.plans[row]
        num_computed = int(batch.num_computed_tokens[row])
        slot = self._slot.get(req_id)
        if slot is None:
            slot = self._slot[req_id] = self._new_slot()
        if plan.cached_path is not None:
            self._admit(slot, plan.cached_path, num_computed)
        elif (held := int(self._num_tokens[slot])) != num_computed and not self._rewind(slot, held - num_computed):
            raise RuntimeError(
                f"request {req_id}: the KV cache holds {held} tokens, the plan continues at {num_computed}"
            )
        if plan.places is not None:
            unit, first_block = map(np.asarray, plan.places)
            self._first_block[slot] = np.maximum(unit, 0) * batch.table_width + first_block
        left = self._leave(slot, plan.runs, num_computed, batch.block_size)
        if plan.num_drafts:
            self._drafted[slot] = _Drafted(plan, left)
        else:
            self._drafted.pop(slot, None)
        return slot

    def _admit(self, slot: int, cached_path: LayerPath, num_computed: int) -> None:
        """Begin with the tokens that were found in the prefix cache, all of one path."""
        self._lens[slot] = path_mask(cached_path, self.num_layers) * num_computed
        self._first_block[slot] = 0
        self._num_tokens[slot] = num_computed
        self._uniform[slot] = cached_path

    def _leave(self, slot: int, runs: Sequence[Run], position: int, block_size: int) -> _Left | None:
        """Note where a request leaves its first path, if it does so in these runs, of which the first is at position.

        Layers that it had not run so far begin in the block of that position: those before it may be shared.
        """
        uniform = self._uniform[slot]
        if uniform is None:
            return None
        for run in runs:
            if run.path != uniform:
                if self.moves_first_blocks and self.units is None:  # else the plan says where they lie
                    self._first_block[slot, ~path_mask(uniform, self.num_layers)] = position // block_size
                self._uniform[slot] = None
                return _Left(uniform, position)
            position += run.num_tokens
        return None

    def _rewind(self, slot: int, num_rejected: int) -> bool:
        """Take back the last num_rejected tokens of a slot. False, and nothing changes, if these are no drafts."""
        drafted = self._drafted.get(slot)
        if drafted is None or not 0 < num_rejected <= drafted.plan.num_drafts:
            return False
        plan, left = drafted
        self._num_tokens[slot] -= num_rejected
        for run in reversed(plan.runs):
            taken = min(run.num_tokens, num_rejected)
            self._lens[slot] -= path_mask(run.path, self.num_layers) * np.int32(taken)
            num_rejected -= taken
        if left is not None and left.position >= self._num_tokens[slot]:  # it left with a rejected draft
            self._uniform[slot], self._first_block[slot] = left.path, 0
        return True

    def _new_slot(self) -> int:
        if not self._free:
            size = len(self._num_tokens)
            self._free = list(range(size, 2 * size))
            self._lens = np.concatenate([self._lens, np.zeros_like(self._lens)])
            self._first_block = np.concatenate([self._first_block, np.zeros_like(self._first_block)])
            self._num_tokens = np.concatenate([self._num_tokens, np.zeros_like(self._num_tokens)])
            self._uniform += [None] * size
        return self._free.pop()
