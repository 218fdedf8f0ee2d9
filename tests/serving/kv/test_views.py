"""The views of the KV cache that layers get, against a plain account of which slot holds which token. No engine."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm_buddy_kernels import KERNELS

from vllm_buddy.method import LayerPath, Run, layers_of, path_of
from vllm_buddy.serving.kv import POLICIES, LayerView, masked
from vllm_buddy.serving.kv.masked import Masked
from vllm_buddy.serving.kv.packed import PackedViews, packed_views
from vllm_buddy.serving.schedule.plan import RequestPlan
from vllm_buddy.serving.worker.batch import RunPlaces, StepBatch, check_plan

NUM_LAYERS = 6
BLOCK_SIZE = 4
MAX_BLOCKS = 16
SHARED_BLOCKS = (1, 2, 3)  # in the prefix cache, on SHARED_PATH
PATHS = [path_of((0, *middle, NUM_LAYERS - 1)) for middle in ((1,), (2,), (1, 3), (2, 4), (1, 2, 3, 4))]
SHARED_PATH = PATHS[2]


@dataclass
class Sequence:
    """One request's account: for each layer, the slots of the tokens that ran it, in order."""

    block_table: np.ndarray
    num_tokens: int = 0
    written: list[list[int]] = field(default_factory=lambda: [[] for _ in range(NUM_LAYERS)])
    cached_path: LayerPath | None = 0

    def aligned_slot(self, position: int) -> int:
        return int(self.block_table[position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE

    def start(self, num_cached: int) -> None:
        """Begin with tokens found in the cache."""
        self.num_tokens, self.cached_path = num_cached, SHARED_PATH
        slots = [self.aligned_slot(position) for position in range(num_cached)]
        self.written = [list(slots) if SHARED_PATH >> layer & 1 else [] for layer in range(NUM_LAYERS)]


def new_sequence(number: int, num_cached_blocks: int) -> Sequence:
    """Blocks of its own, behind the shared ones that it found."""
    own = range(100 + number * MAX_BLOCKS, 100 + (number + 1) * MAX_BLOCKS)
    table = [*SHARED_BLOCKS[:num_cached_blocks], *own][:MAX_BLOCKS]
    sequence = Sequence(np.array(table, dtype=np.int32))
    sequence.start(num_cached_blocks * BLOCK_SIZE)
    return sequence


def step_batch(names: list[str], sequences: list[Sequence], plans: list[RequestPlan]) -> StepBatch:
    lengths = [sum(run.num_tokens for run in plan.runs) for plan in plans]
    slots = [s.aligned_slot(s.num_tokens + i) for s, n in zip(sequences, lengths) for i in range(n)]
    return StepBatch(
        num_layers=NUM_LAYERS,
        req_ids=names,
        plans=plans,
        query_start_loc=np.cumsum([0, *lengths]),
        num_computed_tokens=np.array([s.num_tokens for s in sequences]),
        block_table=torch.from_numpy(np.stack([s.block_table for s in sequences])),
        block_size=BLOCK_SIZE,
        slot_mapping=torch.tensor(slots),
        build_metadata=lambda common: common,
        move_metadata=moved,
        kernels=KERNELS["reference"],
    )


def moved(metadata: CommonAttentionMetadata, table: torch.Tensor, slots: torch.Tensor) -> CommonAttentionMetadata:
    return replace(metadata, block_table_tensor=table, slot_mapping=slots)


def seen_by(batch: StepBatch, view: LayerView, row: int) -> list[int]:
    """The slots that the token in `row` attends to, from what the view gives the attention backend."""
    if view.attn_metadata is None:
        (seq,) = np.flatnonzero((batch.query_start_loc[:-1] <= row) & (row < batch.query_start_loc[1:]))
        length = batch.num_computed_tokens[seq] + row - batch.query_start_loc[seq] + 1
        table = batch.block_table[seq]
    else:
        rows = np.arange(batch.num_tokens) if view.rows_np is None else view.rows_np
        (index,) = np.flatnonzero(rows == row)
        start = view.attn_metadata.query_start_loc_cpu.numpy()
        (seq,) = np.flatnonzero((start[:-1] <= index) & (index < start[1:]))
        length = int(view.attn_metadata.seq_lens[seq]) - (int(start[seq + 1]) - 1 - index)
        table = view.attn_metadata.block_table_tensor.numpy()[seq]
    return [int(table[i // BLOCK_SIZE]) * BLOCK_SIZE + i % BLOCK_SIZE for i in range(length)]


def slot_of(batch: StepBatch, view: LayerView, row: int) -> int:
    if view.slot_mapping is None:
        return int(batch.slot_mapping[row])
    rows = np.arange(batch.num_tokens) if view.rows_np is None else view.rows_np
    return int(view.slot_mapping[np.flatnonzero(rows == row)[0]])


def check_masked(batch: StepBatch, views: list[LayerView], sequences: list[Sequence]) -> None:
    """Every token that runs a layer writes a slot of its own and sees its own request's slots, in order, and itself."""
    shared_slots = range(min(SHARED_BLOCKS) * BLOCK_SIZE, (max(SHARED_BLOCKS) + 1) * BLOCK_SIZE)
    row = 0
    for sequence, plan in zip(sequences, batch.plans, strict=True):
        for run in plan.runs:
            for _ in range(run.num_tokens):
                for layer, view in enumerate(views):
                    runs = view.rows_np is None or row in view.rows_np
                    assert runs == bool(run.path >> layer & 1)
                    if runs:
                        slot = slot_of(batch, view, row)
                        assert slot not in sequence.written[layer]
                        assert slot not in shared_slots
                        sequence.written[layer].append(slot)
                        assert seen_by(batch, view, row) == sequence.written[layer]
                row += 1
                sequence.num_tokens += 1
        assert len(sequence.written[0]) == len(sequence.written[-1]) == sequence.num_tokens


# Steps of one or two runs, as when a request is computed again, or decoding along one path.
_any_steps = st.lists(
    st.lists(st.builds(Run, st.integers(1, 5), st.sampled_from(PATHS)), min_size=1, max_size=2), min_size=1, max_size=5
)
_decoding = st.builds(lambda path, num: [[Run(1, path)]] * num, st.sampled_from(PATHS[:2]), st.integers(2, 5))
# For each request: blocks found in the cache, its steps, and the step it arrives at.
requests = st.lists(
    st.tuples(
        st.integers(0, len(SHARED_BLOCKS)),
        st.one_of(_any_steps, _decoding, st.builds(lambda a, b: (a + b)[:6], _decoding, _any_steps)),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=5,
)
_SETTINGS = settings(max_examples=300, suppress_health_check=list(HealthCheck))


@_SETTINGS
@given(requests)
def test_packed_slots_are_written_once_and_seen_by_their_request_alone(scenario: list) -> None:
    """Fails if a layer's entries overwrite each other, lie in a shared block, or are counted wrong."""
    policy = Masked(NUM_LAYERS)
    sequences = [new_sequence(number, num_cached) for number, (num_cached, _, _) in enumerate(scenario)]
    for step in range(max(start + len(steps) for _, steps, start in scenario)):
        active = [i for i, (_, steps, start) in enumerate(scenario) if start <= step < start + len(steps)]
        plans = []
        for i in active:
            plans.append(RequestPlan(tuple(scenario[i][1][step - scenario[i][2]]), sequences[i].cached_path))
            sequences[i].cached_path = None
        if active:
            batch = step_batch([str(i) for i in active], [sequences[i] for i in active], plans)
            check_masked(batch, policy.views(batch, policy.places(batch)), [sequences[i] for i in active])
    for i in range(len(scenario)):
        assert policy.layer_lengths(str(i)).tolist() == [len(slots) for slots in sequences[i].written]
        policy.forget(str(i))


def test_views_of_requests_that_decode_on_are_made_anew_where_one_begins_a_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if tables and rows of requests on different paths are gathered in every step."""
    made: list[int] = []

    def counted(batch: StepBatch, places: RunPlaces) -> PackedViews:
        made.append(int(batch.num_computed_tokens[0]))
        return packed_views(batch, places)

    monkeypatch.setattr(masked, "packed_views", counted)
    policy, sequences = Masked(NUM_LAYERS), [new_sequence(number, 0) for number in range(2)]
    for step in range(12):
        plans = [RequestPlan((Run(1, PATHS[i]),), PATHS[i] if step == 0 else None) for i in range(2)]
        batch = step_batch(["a", "b"], sequences, plans)
        check_masked(batch, policy.views(batch, policy.places(batch)), sequences)
    # The first step starts the requests, and the second is the first that repeats one.
    assert made == [0, 1, 4, 8]


@_SETTINGS
@given(requests, st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_packed_slots_of_rejected_drafts_are_written_again(scenario: list, rejections: list[int]) -> None:
    """Fails if a layer keeps a rejected draft, or a request that left its first path with one does not return to it."""
    policy = Masked(NUM_LAYERS)
    sequences = [new_sequence(number, num_cached) for number, (num_cached, _, _) in enumerate(scenario)]
    for step in range(max(len(steps) for _, steps, _ in scenario)):
        active = [i for i, (_, steps, _) in enumerate(scenario) if step < len(steps)]
        plans, num_rejected = [], []
        for i in active:
            runs = scenario[i][1][step]
            num_drafts = sum(run.num_tokens for run in runs) - 1
            plans.append(RequestPlan(tuple(runs), sequences[i].cached_path, num_drafts=num_drafts))
            sequences[i].cached_path = None
            num_rejected.append(min(rejections[(step + i) % len(rejections)], num_drafts))
        batch = step_batch([str(i) for i in active], [sequences[i] for i in active], plans)
        check_masked(batch, policy.views(batch, policy.places(batch)), [sequences[i] for i in active])
        for i, plan, rejected in zip(active, plans, num_rejected):
            paths = [run.path for run in plan.runs for _ in range(run.num_tokens)]
            for path in paths[len(paths) - rejected :]:
                for layer in layers_of(path):
                    sequences[i].written[layer].pop()
            sequences[i].num_tokens -= rejected


@pytest.mark.parametrize("name", ["kv_only", "zero"])
@_SETTINGS
@given(requests)
def test_aligned_views_write_every_position_and_see_all_before(name: str, scenario: list) -> None:
    """Fails if a skipped row writes nothing, a row is both run and skipped, or a run sees too little or too much."""
    policy = POLICIES[name](NUM_LAYERS)
    sequences = [new_sequence(number, num_cached) for number, (num_cached, _, _) in enumerate(scenario)]
    for turn in range(2):
        plans = [RequestPlan(tuple(steps[turn % len(steps)]), None) for _, steps, _ in scenario]
        batch = step_batch([str(i) for i in range(len(scenario))], sequences, plans)
        paths = [run.path for plan in plans for run in plan.runs for _ in range(run.num_tokens)]
        for layer, view in enumerate(policy.views(batch, policy.places(batch))):
            ran = list(range(batch.num_tokens)) if view.rows_np is None else view.rows_np.tolist()
            skipped = [] if view.skipped is None else view.skipped.tolist()
            assert ran == [row for row, path in enumerate(paths) if path >> layer & 1]
            assert sorted(ran + skipped) == list(range(batch.num_tokens))
            if skipped:
                assert view.skipped_slots.tolist() == batch.slot_mapping[skipped].tolist()
            for row in ran:
                assert slot_of(batch, view, row) == int(batch.slot_mapping[row])
                seq = int(np.searchsorted(batch.query_start_loc, row, side="right")) - 1
                position = int(batch.num_computed_tokens[seq] + row - batch.query_start_loc[seq])
                assert seen_by(batch, view, row) == [sequences[seq].aligned_slot(p) for p in range(position + 1)]
        for sequence, start, end in zip(sequences, batch.query_start_loc, batch.query_start_loc[1:]):
            sequence.num_tokens += int(end - start)


def test_runs_that_follow_each_other_are_one_sequence_to_attention() -> None:
    """Fails if attention is called for each short run of a prompt although a layer runs many of them in a row."""
    middle = layers_of(PATHS[0])[1]
    plans = [
        RequestPlan((Run(3, PATHS[0]), Run(1, PATHS[2]), Run(2, PATHS[1]), Run(4, PATHS[2])), None),
        RequestPlan((Run(2, PATHS[0]),), None),
    ]
    batch = step_batch(["a", "b"], [new_sequence(0, 0), new_sequence(1, 0)], plans)
    policy = POLICIES["kv_only"](NUM_LAYERS)
    metadata = policy.views(batch, policy.places(batch))[middle].attn_metadata
    assert np.diff(metadata.query_start_loc_cpu.numpy()).tolist() == [4, 4, 2]
    assert metadata.seq_lens.tolist() == [4, 10, 2]


@pytest.mark.parametrize("name", POLICIES)
def test_a_pipeline_stage_gets_the_views_of_its_own_layers(name: str) -> None:
    """Fails if a stage runs its layers on the rows, lengths or slots of other layers."""
    whole, stage = POLICIES[name](NUM_LAYERS), POLICIES[name](NUM_LAYERS, stage=slice(2, 5))
    sequences = [new_sequence(number, 1) for number in range(len(PATHS))]
    plans = [RequestPlan((Run(2, PATHS[2]), Run(3, path)), SHARED_PATH) for path in PATHS]
    batch = step_batch([str(i) for i in range(len(PATHS))], sequences, plans)
    wanted, got = (policy.views(batch, policy.places(batch)) for policy in (whole, stage))
    for one, other in zip(wanted[2:5], got, strict=True):
        assert np.array_equal(one.rows_np, other.rows_np)
        assert (one.attn_metadata is None) == (other.attn_metadata is None)
        if one.attn_metadata is not None:
            assert one.slot_mapping.tolist() == other.slot_mapping.tolist()
            assert one.attn_metadata.seq_lens.tolist() == other.attn_metadata.seq_lens.tolist()
    assert any(view.attn_metadata is not None for view in got)


def test_a_plan_that_continues_elsewhere_than_the_cache_is_refused() -> None:
    """Fails if scheduler and worker may disagree on what the cache holds without anyone noticing."""
    policy, sequence = Masked(NUM_LAYERS), new_sequence(0, 0)
    policy.places(step_batch(["r"], [sequence], [RequestPlan((Run(3, PATHS[0]),), SHARED_PATH)]))
    sequence.num_tokens = 2
    with pytest.raises(RuntimeError, match="the KV cache holds 3 tokens, the plan continues at 2"):
        policy.places(step_batch(["r"], [sequence], [RequestPlan((Run(1, PATHS[0]),), None)]))
    sequence.num_tokens = 3
    policy.places(step_batch(["r"], [sequence], [RequestPlan((Run(4, PATHS[0]),), None, num_drafts=2)]))
    sequence.num_tokens = 4
    with pytest.raises(RuntimeError, match="the KV cache holds 7 tokens, the plan continues at 4"):
        policy.places(step_batch(["r"], [sequence], [RequestPlan((Run(1, PATHS[0]),), None)]))


def test_a_plan_that_does_not_cover_its_tokens_is_refused() -> None:
    """Fails if a token without a path is served."""
    for lengths in ([3], [3, 2, -1], [4, 0]):
        plan = RequestPlan(tuple(Run(length, PATHS[0]) for length in lengths), None)
        with pytest.raises(RuntimeError, match=r"request r: 4 tokens scheduled, runs of .* tokens planned"):
            check_plan([plan], [4], ["r"])


def test_a_plan_of_layers_that_are_not_loaded_is_refused() -> None:
    """Fails if a token silently passes a layer of its path."""
    plan = RequestPlan((Run(2, PATHS[0]), Run(2, PATHS[1])), None)
    check_plan([plan], [4], ["r"], absent=path_of([3, 4]))
    with pytest.raises(RuntimeError, match="request r: a path holds layers that are not loaded"):
        check_plan([plan], [4], ["r"], absent=path_of([2]))


def test_slots_of_finished_requests_are_used_again() -> None:
    """Fails if the state of masked grows with the number of requests served, or is inherited."""
    policy = Masked(NUM_LAYERS)
    for number in range(1000):
        sequence = new_sequence(0, 0)
        batch = step_batch([str(number)], [sequence], [RequestPlan((Run(5, PATHS[number % 5]),), SHARED_PATH)])
        check_masked(batch, policy.views(batch, policy.places(batch)), [sequence])
        lengths = policy.layer_lengths(str(number)).tolist()
        assert lengths == [5 if layer in layers_of(PATHS[number % 5]) else 0 for layer in range(NUM_LAYERS)]
        policy.forget(str(number))
    assert len(policy._num_tokens) < 1000
    many = [new_sequence(i, 0) for i in range(200)]
    plans = [RequestPlan((Run(1, PATHS[i % 5]),), SHARED_PATH) for i in range(200)]
    batch = step_batch([str(i) for i in range(200)], many, plans)
    check_masked(batch, policy.views(batch, policy.places(batch)), many)
