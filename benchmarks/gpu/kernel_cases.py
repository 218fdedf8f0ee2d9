"""Makes the inputs of the kernel benchmark at the shapes of three models, and counts the bytes each op must move.

The bytes are what must be read and written once, whatever the kernel does. GB/s is these bytes over a kernel's time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm_buddy_kernels import (
    bypass_rows,
    bypass_rows_reference,
    gather_rows,
    gather_rows_reference,
    layer_slots,
    layer_slots_reference,
    scatter_rows,
    scatter_rows_reference,
)

Op = Callable[..., Any]
OPS: dict[str, tuple[Op, Op]] = {
    "layer_slots": (layer_slots, layer_slots_reference),
    "gather_rows": (gather_rows, gather_rows_reference),
    "scatter_rows": (scatter_rows, scatter_rows_reference),
    "bypass_rows": (bypass_rows, bypass_rows_reference),
}
# The references of these ops ask the device for a size, which cannot be captured in a CUDA graph.
ASKS_DEVICE = ("layer_slots", "bypass_rows")
IN_PLACE = ("layer_slots",)  # ops that write into their last two arguments

DTYPE = torch.bfloat16
ITEM, WORD, INDEX = 2, 8, 4  # bytes of a number in DTYPE, of a slot or row number, of an int32
BLOCK_SIZE = 16
BYPASS_RANK = 64
EPS = 1e-6

BATCHES = (1, 8, 32, 128)
LARGE_ROWS = 2048


@dataclass(frozen=True)
class Model:
    name: str
    hidden_size: int
    num_layers: int


MODELS = (
    Model("Llama-3.1-8B", 4096, 32),
    Model("Qwen2.5-7B", 3584, 28),
    Model("SmolLM2-135M", 576, 30),
)


@dataclass(frozen=True)
class Case:
    """One op at one shape. make: device -> arguments for the kernel and for its reference."""

    op: str
    about: dict[str, Any]
    num_bytes: int
    make: Callable[[str], tuple[Any, ...]]

    @property
    def name(self) -> str:
        return " ".join(map(str, (self.op, *self.about.values())))

    def run(self, function: Op, arguments: tuple[Any, ...]) -> Sequence[torch.Tensor]:
        """Call `function` and return all outputs. Outputs that are written in place are the arguments themselves."""
        outputs = function(*arguments)
        if self.op in IN_PLACE:
            return arguments[-2:]
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def poison(self, arguments: tuple[Any, ...]) -> None:
        """Overwrite the buffers that the op writes into, so that elements it does not write are noticed."""
        for output in arguments[-2:] if self.op in IN_PLACE else ():
            output.fill_(-7)


def all_cases(ops: Sequence[str], models: Sequence[Model] = MODELS) -> Iterator[Case]:
    """Yield every op at every shape that is measured."""
    for model in models:
        about: dict[str, Any] = {"model": model.name}
        hidden = model.hidden_size
        if "layer_slots" in ops:
            for batch in BATCHES:
                yield slots_case(model, batch)
        for rows in (*BATCHES, LARGE_ROWS):
            if "gather_rows" in ops:
                yield Case("gather_rows", {**about, "rows": rows}, gather_bytes(rows, hidden), _gather(rows, hidden))
            if "scatter_rows" in ops:
                yield Case("scatter_rows", {**about, "rows": rows}, scatter_bytes(rows, hidden), _scatter(rows, hidden))
        for rows in BATCHES if "bypass_rows" in ops else ():
            num_bytes = bypass_bytes(rows, hidden, BYPASS_RANK)
            yield Case("bypass_rows", {**about, "rows": rows}, num_bytes, _bypass(rows, hidden, BYPASS_RANK))


def slots_bytes(num_views: int, num_tokens: int, num_runs: int) -> int:
    """Return the bytes of layer_slots.

    For each token: its run, and per view an entry of the block table and the slot. For each run: its start and request,
    and per view its first position and length. In addition the end of the last run.
    """
    tokens = num_tokens * (INDEX + num_views * (INDEX + WORD))
    return tokens + num_runs * (2 * INDEX + num_views * 2 * INDEX) + INDEX


def gather_bytes(num_rows: int, hidden_size: int) -> int:
    """Return the bytes of gather_rows: row numbers (64 bits); hidden, residual, normed and state; the weight."""
    return num_rows * WORD + (4 * num_rows + 1) * hidden_size * ITEM


def scatter_bytes(num_tokens: int, hidden_size: int) -> int:
    """Return the bytes of scatter_rows: sources; for each token one pair in, normed and state out; the weight."""
    return num_tokens * INDEX + (4 * num_tokens + 1) * hidden_size * ITEM


def bypass_bytes(num_tokens: int, hidden_size: int, rank: int) -> int:
    """Return the bytes of bypass_rows: flags of one byte; hidden and residual in, the state out; both matrices."""
    return num_tokens + (3 * num_tokens + 2 * rank) * hidden_size * ITEM


def slots_case(model: Model, batch: int, context: int = 1024) -> Case:
    """Return a case with one token per request and one view per layer, in which a quarter of the layers is skipped."""
    views, width = model.num_layers, context // BLOCK_SIZE

    def make(device: str) -> tuple[Any, ...]:
        order = torch.arange(batch + 1, dtype=torch.int32, device=device)
        table = torch.randperm(batch * width, device=device).int().view(batch, width)
        first = torch.randint(0, context - 1, (views, batch), dtype=torch.int32, device=device)
        first.masked_fill_(torch.rand(views, batch, device=device) < 0.25, -1)
        slots = torch.empty(views, batch, dtype=torch.int64, device=device)
        lengths = torch.empty(views, batch, dtype=torch.int32, device=device)
        return table, order[:-1], order[:-1].clone(), order.clone(), first, None, BLOCK_SIZE, 1, slots, lengths

    about = {"model": model.name, "rows": batch}
    return Case("layer_slots", about, slots_bytes(views, batch, batch), make)


def _gather(rows: int, hidden_size: int) -> Callable[[str], tuple[Any, ...]]:
    def make(device: str) -> tuple[Any, ...]:
        hidden, residual = _normal(device, rows, hidden_size), _normal(device, rows, hidden_size)
        return hidden, residual, torch.randperm(rows, device=device), _normal(device, hidden_size), EPS

    return make


def _scatter(rows: int, hidden_size: int) -> Callable[[str], tuple[Any, ...]]:
    """Make inputs in which three quarters of the tokens ran the layer, and at least one."""

    def make(device: str) -> tuple[Any, ...]:
        num_ran = -(-3 * rows // 4)
        source = torch.full((rows,), -1, dtype=torch.int32, device=device)
        source[torch.randperm(rows, device=device)[:num_ran]] = torch.arange(num_ran, dtype=torch.int32, device=device)
        ran = (_normal(device, num_ran, hidden_size), _normal(device, num_ran, hidden_size))
        stayed = (_normal(device, rows, hidden_size), _normal(device, rows, hidden_size))
        return *ran, source, *stayed, _normal(device, hidden_size), EPS

    return make


def _bypass(rows: int, hidden_size: int, rank: int) -> Callable[[str], tuple[Any, ...]]:
    """Make inputs in which all rows skip. The matrices keep the scale of their inputs, so a wrong product is seen."""

    def make(device: str) -> tuple[Any, ...]:
        hidden, residual = _normal(device, rows, hidden_size), _normal(device, rows, hidden_size)
        down = _normal(device, rank, hidden_size) / hidden_size**0.5
        up = _normal(device, hidden_size, rank) / rank**0.5
        return hidden, residual, torch.ones(rows, dtype=torch.bool, device=device), down, up, EPS

    return make


def _normal(device: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=DTYPE)
