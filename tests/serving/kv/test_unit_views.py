"""The views of layers whose KV lies in units, against a plain account of which slot holds which token. No engine."""

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import given
from vllm_buddy_kernels import KERNELS

from tests.serving.kv.test_views import (
    _SETTINGS,
    BLOCK_SIZE,
    MAX_BLOCKS,
    NUM_LAYERS,
    SHARED_PATH,
    moved,
    requests,
)
from tests.serving.schedule.test_request_units import GivenRoute
from vllm_buddy.method import Run, full_path, layers_of
from vllm_buddy.method.kv_units import KVUnits
from vllm_buddy.serving.kv import LayerView
from vllm_buddy.serving.kv.masked import Masked
from vllm_buddy.serving.schedule.plan import RequestPlan
from vllm_buddy.serving.schedule.request_units import RequestUnits
from vllm_buddy.serving.worker.batch import StepBatch

UNITS = KVUnits((0, 0, 1, 0, 1, 1))
NULL_BLOCK = 0
OWN_BLOCKS = 100  # the first that belongs to one request; those before are null or shared


@dataclass
class Account:
    """One request: its units, its block tables, and for each layer the slots of the tokens that ran it, in order."""

    number: int
    num_cached: int  # blocks
    steps: list[list[Run]]
    num_tokens: int = 0
    sent: int = 0
    started: bool = False
    written: list[list[int]] = field(default_factory=lambda: [[] for _ in range(NUM_LAYERS)])

    def __post_init__(self) -> None:
        self.num_tokens = self.num_cached * BLOCK_SIZE
        runs = [Run(self.num_tokens, SHARED_PATH), *(run for step in self.steps for run in step)]
        self.units = RequestUnits(UNITS, GivenRoute(*runs, first_path=SHARED_PATH), BLOCK_SIZE)
        for layer in layers_of(SHARED_PATH):
            table = self.table()[self.units.layer_places().unit[layer]]
            self.written[layer] = [_slot(table, position) for position in range(self.num_tokens)]

    def table(self) -> np.ndarray:
        """[num_units, MAX_BLOCKS], as vLLM gives them out: shared ones first, null where a unit needs none."""
        table = np.full((UNITS.num_units, MAX_BLOCKS), NULL_BLOCK, dtype=np.int32)
        for unit, (first, end) in enumerate(zip(self.units.first_blocks, self.units.num_blocks(self.units._decided))):
            own = OWN_BLOCKS + (self.number * UNITS.num_units + unit) * MAX_BLOCKS
            table[unit, first:end] = np.arange(own + first, own + end)
            if unit < self.units.num_shared:
                table[unit, : self.num_cached] = 1 + unit * MAX_BLOCKS + np.arange(self.num_cached)
        return table

    def plan(self, step: int) -> RequestPlan:
        runs = tuple(self.steps[step])
        self.units.advance(self.num_tokens + sum(run.num_tokens for run in runs), [])
        starts = not self.started
        places = self.units.layer_places() if starts or self.sent != self.units.held else None
        self.started, self.sent = True, self.units.held
        return RequestPlan(runs, SHARED_PATH if starts else None, places=places)


def _slot(table: np.ndarray, position: int) -> int:
    return int(table[position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE


def step_batch(accounts: list[Account], plans: list[RequestPlan]) -> StepBatch:
    lengths = [sum(run.num_tokens for run in plan.runs) for plan in plans]
    tables = np.stack([account.table().reshape(-1) for account in accounts])
    return StepBatch(
        num_layers=NUM_LAYERS,
        req_ids=[str(account.number) for account in accounts],
        plans=plans,
        query_start_loc=np.cumsum([0, *lengths]),
        num_computed_tokens=np.array([account.num_tokens for account in accounts]),
        block_table=torch.from_numpy(tables),
        block_size=BLOCK_SIZE,
        slot_mapping=None,
        build_metadata=lambda common: common,
        move_metadata=moved,
        kernels=KERNELS["reference"],
        units=UNITS,
    )


def seen_and_slot(batch: StepBatch, view: LayerView, row: int) -> tuple[list[int], int]:
    """The slots that the token in `row` attends to in a layer, and the one that it writes."""
    (index,) = np.flatnonzero((np.arange(batch.num_tokens) if view.rows_np is None else view.rows_np) == row)
    start = view.attn_metadata.query_start_loc_cpu.numpy()
    (seq,) = np.flatnonzero((start[:-1] <= index) & (index < start[1:]))
    length = int(view.attn_metadata.seq_lens[seq]) - (int(start[seq + 1]) - 1 - index)
    table = view.attn_metadata.block_table_tensor.numpy()[seq]
    return [_slot(table, i) for i in range(length)], int(view.slot_mapping[index])


@_SETTINGS
@given(requests)
def test_no_two_layers_or_requests_share_a_place(scenario: list) -> None:
    """Fails if a token's K and V overwrite another's, lie in a shared or the null block, or are not seen in order."""
    policy = Masked(NUM_LAYERS, units=UNITS)
    accounts = [Account(number, num_cached, steps) for number, (num_cached, steps, _) in enumerate(scenario)]
    taken: set[tuple[int, int]] = set()  # slot and class: what of the memory one token of one layer fills
    for step in range(max(start + len(steps) for _, steps, start in scenario)):
        active = [i for i, (_, steps, start) in enumerate(scenario) if start <= step < start + len(steps)]
        if not active:
            continue
        plans = [accounts[i].plan(step - scenario[i][2]) for i in active]
        batch = step_batch([accounts[i] for i in active], plans)
        views = policy.views(batch, policy.places(batch))
        row = 0
        for i, plan in zip(active, plans):
            for path in [run.path for run in plan.runs for _ in range(run.num_tokens)]:
                for layer, view in enumerate(views):
                    assert (view.rows_np is None or row in view.rows_np) == bool(path >> layer & 1)
                    if path >> layer & 1:
                        seen, slot = seen_and_slot(batch, view, row)
                        assert view.attn_metadata.slot_mapping is view.slot_mapping
                        assert slot // BLOCK_SIZE >= OWN_BLOCKS
                        assert (slot, UNITS.class_of[layer]) not in taken
                        taken.add((slot, UNITS.class_of[layer]))
                        accounts[i].written[layer].append(slot)
                        assert seen == accounts[i].written[layer]
                row += 1
                accounts[i].num_tokens += 1


def test_metadata_is_built_once_for_all_layers_of_equal_lengths() -> None:
    """Fails if each unit pays for metadata of its own, of which only blocks and slots differ between units."""
    built: list[int] = []
    policy, paths = Masked(NUM_LAYERS, units=UNITS), (full_path(NUM_LAYERS), SHARED_PATH)
    accounts = [
        Account(number, 0, [[Run(3, path)], [Run(1, path)], [Run(1, path)]]) for number, path in enumerate(paths)
    ]
    for account, path in zip(accounts, paths):
        account.units = RequestUnits(UNITS, GivenRoute(Run(9, path), first_path=path), BLOCK_SIZE)
    for step in range(3):
        batch = step_batch(accounts, [account.plan(step) for account in accounts])
        batch.build_metadata = lambda common: built.append(common.num_reqs) or common
        views = policy.views(batch, policy.places(batch))
        for account in accounts:
            account.num_tokens += 3 if step == 0 else 1
    assert len({id(view) for view in views}) > 2
    assert built == [2, 1] * 3  # of both requests, and of the one at full depth
