"""The views of layers whose KV lies in units, against a plain account of which slot holds which token. No engine."""

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import given
from vllm_buddy_kernels import KERNELS

from tests.serving.kv.test_views import _SETTINGS, BLOCK_SIZE, MAX_BLOCKS, NUM_LAYERS, SHARED_PATH, requests
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
        slot_mapping=torch.zeros(sum(lengths), dtype=torch.int64),
        build_metadata=lambda common: common,
        kernels=KERNELS["reference"],
        units=UNITS,
    )


def seen_and_slot(batch: StepBatch, layer: int, view: LayerView, row: int) -> tuple[list[int], int]:
    """The slots that the token in `row` attends to in a layer, and the one that it writes."""
    if view.attn_metadata is None:  # vLLM's own, of the KV-cache group of a unit
        (seq,) = np.flatnonzero((batch.query_start_loc[:-1] <= row) & (row < batch.query_start_loc[1:]))
        length = int(batch.num_computed_tokens[seq] + row - batch.query_start_loc[seq] + 1)
        unit = UNITS.home[layer if view.metadata_of is None else view.metadata_of]
        table = batch.block_table[seq].numpy()[unit * MAX_BLOCKS : (unit + 1) * MAX_BLOCKS]
        return [_slot(table, i) for i in range(length)], _slot(table, length - 1)
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
                        seen, slot = seen_and_slot(batch, layer, view, row)
                        assert slot // BLOCK_SIZE >= OWN_BLOCKS
                        assert (slot, UNITS.class_of[layer]) not in taken
                        taken.add((slot, UNITS.class_of[layer]))
                        accounts[i].written[layer].append(slot)
                        assert seen == accounts[i].written[layer]
                row += 1
                accounts[i].num_tokens += 1


def test_full_depth_runs_on_vllms_own_metadata() -> None:
    """Fails if a server whose requests all run all layers builds metadata of its own."""
    accounts = [Account(number, 0, []) for number in range(2)]
    policy = Masked(NUM_LAYERS, units=UNITS)
    for account in accounts:
        account.units = RequestUnits(UNITS, GivenRoute(Run(9, full_path(NUM_LAYERS))), BLOCK_SIZE)
    plans = [
        RequestPlan((Run(3, full_path(NUM_LAYERS)),), full_path(NUM_LAYERS), places=a.units.layer_places())
        for a in accounts
    ]
    batch = step_batch(accounts, plans)
    views = policy.views(batch, policy.places(batch))
    assert all(view == LayerView() for view in views)


def test_a_batch_on_one_path_reads_the_metadata_that_vllm_made_for_its_units() -> None:
    """Fails if metadata is built for layers that only lie in another unit than at full depth."""
    accounts = [Account(number, 0, [[Run(3, SHARED_PATH)], [Run(1, SHARED_PATH)]]) for number in range(2)]
    policy = Masked(NUM_LAYERS, units=UNITS)
    for step in range(2):
        batch = step_batch(accounts, [account.plan(step) for account in accounts])
        views = policy.views(batch, policy.places(batch))
        unit = accounts[0].units.layer_places().unit
        for layer in layers_of(SHARED_PATH):
            assert views[layer].rows_np is None
            assert views[layer].attn_metadata is None
            other = views[layer].metadata_of
            assert UNITS.home[layer if other is None else other] == unit[layer]
        for account in accounts:
            account.num_tokens += 3 if step == 0 else 1
