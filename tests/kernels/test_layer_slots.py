"""Tests layer_slots: slots and lengths of all views from the plan of a step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from vllm_buddy_kernels.layer_slots import _layer_slots, layer_slots, layer_slots_reference
from vllm_buddy_kernels.triton_import import KernelError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDLE_LENGTH = 7  # a length that no run of the cases has by chance
POISON = -99
Op = Callable[..., Any]
OPS = pytest.mark.parametrize("op", [layer_slots, layer_slots_reference])
# (lengths of runs, number of views); the requests hold one or two runs each.
PLANS = {
    "one token": ([1], 2),
    "decode": ([1] * 63, 3),
    "prefill": ([200, 1, 17, 39], 2),  # 257 tokens
    "empty run": ([3, 0, 2], 2),
}
if DEVICE == "cuda":
    PLANS |= {"decode of a server": ([1] * 128, 32), "long prefill": ([4096, 1, 1, 4094], 28)}


@dataclass
class Plan:
    """The arguments of the op, on the host."""

    block_table: torch.Tensor
    token_run: torch.Tensor
    run_request: torch.Tensor
    run_start: torch.Tensor
    first_position: torch.Tensor
    first_block: Any  # or None
    block_size: int

    def arguments(self, columns: tuple[int, int]) -> tuple[Any, ...]:
        """Return the arguments, with poisoned outputs. columns: numbers of columns for tokens and for runs."""
        num_views = len(self.first_position)
        slots = torch.full((num_views, columns[0]), POISON, dtype=torch.int64, device=DEVICE)
        lengths = torch.full((num_views, columns[1]), POISON, dtype=torch.int32, device=DEVICE)
        given: list[torch.Tensor | None] = [
            self.block_table,
            self.token_run,
            self.run_request,
            self.run_start,
            self.first_position,
            self.first_block,
        ]
        return *(None if t is None else t.to(DEVICE) for t in given), self.block_size, IDLE_LENGTH, slots, lengths

    def wanted(self, columns: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return slots and lengths, computed token by token."""
        num_views, num_runs = self.first_position.shape
        slots = torch.full((num_views, columns[0]), -1, dtype=torch.int64)
        lengths = torch.full((num_views, columns[1]), IDLE_LENGTH, dtype=torch.int32)
        for view in range(num_views):
            for run in range(num_runs):
                start, end = self.run_start[run : run + 2].tolist()
                first = int(self.first_position[view, run])
                if first < 0:
                    continue
                lengths[view, run] = first + end - start
                first_block = 0 if self.first_block is None else int(self.first_block[view, run])
                row = self.block_table[self.run_request[run], first_block:].tolist()
                for token in range(start, end):
                    position = first + token - start
                    slots[view, token] = row[position // self.block_size] * self.block_size + position % self.block_size
        return slots, lengths


def make_plan(name: str, block_size: int = 16, with_first_block: bool = True) -> Plan:
    run_lengths, num_views = PLANS[name]
    torch.manual_seed(len(run_lengths) + block_size)
    num_runs, num_tokens = len(run_lengths), sum(run_lengths)
    run_request = (torch.arange(num_runs) + 1).div(2, rounding_mode="floor").int()
    num_reqs = int(run_request[-1]) + 1
    first_position = torch.randint(0, 100, (num_views, num_runs)).int()
    first_position[torch.rand(num_views, num_runs) < 0.3] = -1
    first_position[0] = -1  # a view that nobody runs
    first_position[1, 0] = 0
    first_block = torch.randint(0, 5, (num_views, num_runs)).int() if with_first_block else None
    num_blocks = 5 + -(-(100 + max(run_lengths)) // block_size)
    block_table = torch.randperm(num_reqs * num_blocks).int().view(num_reqs, num_blocks)
    token_run = torch.repeat_interleave(torch.arange(num_runs), torch.tensor(run_lengths)).int()
    token_run = torch.cat([token_run, torch.full((9,), 2**30, dtype=torch.int32)])  # garbage after the tokens
    run_start = torch.tensor([0, *torch.tensor(run_lengths).cumsum(0)]).int()
    assert int(run_start[-1]) == num_tokens
    return Plan(block_table, token_run, run_request, run_start, first_position, first_block, block_size)


def check(op: Op, plan: Plan, columns: tuple[int, int]) -> None:
    *inputs, slots, lengths = plan.arguments(columns)
    op(*inputs, slots, lengths)
    wanted_slots, wanted_lengths = plan.wanted(columns)
    assert torch.equal(slots.cpu(), wanted_slots)
    assert torch.equal(lengths.cpu(), wanted_lengths)


@OPS
@pytest.mark.parametrize("with_first_block", [False, True])
@pytest.mark.parametrize("block_size", [1, 16, 24])
@pytest.mark.parametrize("name", PLANS)
def test_token_by_token(op: Op, name: str, block_size: int, with_first_block: bool) -> None:
    """Fails if a slot or a length differs from what the definition gives, token by token."""
    plan = make_plan(name, block_size, with_first_block)
    check(op, plan, (int(plan.run_start[-1]), len(plan.run_request)))


@OPS
@pytest.mark.parametrize("more", [(9, 5), (300, 0), (0, 1100)])
@pytest.mark.parametrize("name", ["one token", "prefill"])
def test_wider_buffers(op: Op, name: str, more: tuple[int, int]) -> None:
    """Fails if columns after the tokens and runs keep old values, or garbage in token_run is followed."""
    plan = make_plan(name)
    check(op, plan, (int(plan.run_start[-1]) + more[0], len(plan.run_request) + more[1]))


@OPS
def test_padded_runs(op: Op) -> None:
    """Fails if runs of no tokens at the end, which pad a captured graph, are given slots or lengths."""
    plan = make_plan("prefill")
    pad = torch.full((3,), int(plan.run_start[-1])).int()
    padded = replace(
        plan,
        run_request=torch.cat([plan.run_request, torch.full((3,), 2**30).int()]),
        run_start=torch.cat([plan.run_start, pad]),
        first_position=torch.cat([plan.first_position, torch.full((2, 3), -1).int()], 1),
        first_block=torch.cat([plan.first_block, torch.full((2, 3), 2**30).int()], 1),
    )
    check(op, padded, (300, 7))


@OPS
def test_slices_of_persistent_buffers(op: Op) -> None:
    """Fails if strides are mistaken for widths, or memory beside the slices is written."""
    plan = make_plan("prefill")
    num_views, num_runs = plan.first_position.shape
    num_tokens = int(plan.run_start[-1])
    *inputs, _, _ = plan.arguments((num_tokens, num_runs))
    table = torch.full((inputs[0].shape[0], inputs[0].shape[1] + 3), POISON, dtype=torch.int32, device=DEVICE)
    table[:, : inputs[0].shape[1]] = inputs[0]
    inputs[0] = table[:, : inputs[0].shape[1]]
    inputs[4] = inputs[4].T.contiguous().T
    inputs[5] = inputs[5].repeat_interleave(2, 1)[:, ::2]
    slots = torch.full((num_views + 2, num_tokens + 5), POISON, dtype=torch.int64, device=DEVICE)
    lengths = torch.full((num_views + 2, num_runs + 5), POISON, dtype=torch.int32, device=DEVICE)
    inner = slots[1:-1, 2 : num_tokens + 2], lengths[1:-1, 2 : num_runs + 2]
    op(*inputs, *inner)
    for whole, part, wanted in zip((slots, lengths), inner, plan.wanted((num_tokens, num_runs)), strict=True):
        assert torch.equal(part.cpu(), wanted)
        part.fill_(POISON)
        assert (whole == POISON).all()


@OPS
@pytest.mark.parametrize("columns", [(0, 0), (0, 3), (4, 0)])
def test_nothing_to_do(op: Op, columns: tuple[int, int]) -> None:
    """Fails if a step without tokens, runs or views is an error, or leaves columns unwritten."""
    empty = torch.empty(0, dtype=torch.int32)
    table, places = torch.zeros(1, 4, dtype=torch.int32), torch.empty(2, 0, dtype=torch.int32)
    check(op, Plan(table, empty, empty, torch.zeros(1, dtype=torch.int32), places, None, 16), columns)
    plan = make_plan("prefill")
    check(op, replace(plan, first_position=plan.first_position[:0], first_block=plan.first_block[:0]), (257, 4))


def test_large_slots() -> None:
    """Fails if slots are computed in 32 bits: a large cache of small heads has more than 2**31 of them."""
    plan = make_plan("decode", block_size=16)
    check(layer_slots, replace(plan, block_table=plan.block_table + 2**30), (63, 63))


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, lambda t: t.long(), "block_table is 2-d torch.int64"),
        (1, lambda t: t[:, None], "token_run is 2-d"),
        (3, lambda t: t[:-1], "run_start has 4 entries"),
        (3, lambda t: t.repeat_interleave(2)[::2], "run_start has stride 2"),
        (4, lambda t: t[:, :-1], r"first_position is \[2, 3\]"),
        (5, lambda t: t[:1], r"first_block is \[1, 4\]"),
        (6, lambda t: 0, "block_size is 0"),
        (8, lambda t: t.int(), "slots is 2-d torch.int32"),
        (9, lambda t: t[:1], "lengths 1 rows"),
        (9, lambda t: t.T.contiguous().T, "lengths has stride 2"),
    ],
)
def test_errors(index: int, wrong: Callable[[Any], Any], message: str) -> None:
    """Fails if a wrong tensor reaches the kernel, where it would be read out of bounds."""
    arguments = list(make_plan("prefill").arguments((257, 4)))
    arguments[index] = wrong(arguments[index])
    with pytest.raises(KernelError, match=message):
        layer_slots(*arguments)


def test_op() -> None:
    """Fails if the op writes what its schema does not say, or cannot be traced."""
    arguments = make_plan("empty run").arguments((8, 4))
    torch.library.opcheck(_layer_slots, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(DEVICE != "cuda", reason="captures a CUDA graph")
def test_captured() -> None:
    """Fails if the launch reads the plan on the host, so that a replay serves the step of the capture."""
    plan = make_plan("prefill")
    arguments = plan.arguments((300, 4))
    layer_slots(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer_slots(*arguments)
    smaller = replace(plan, run_start=plan.run_start.clamp(max=210))
    arguments[3].copy_(smaller.run_start)
    graph.replay()
    wanted = smaller.wanted((300, 4))
    assert torch.equal(arguments[8].cpu(), wanted[0])
    assert torch.equal(arguments[9].cpu(), wanted[1])
