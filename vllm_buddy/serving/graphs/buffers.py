"""The buffers that captured decode steps read and write: their addresses are fixed, their contents change."""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm_buddy.serving.forward.models import RoutedBackbone

_MOST_INDICES = 1 << 22  # of block tables that are made at once

# What a step has for each layer and row (DecodeBuffers.plan).
FIRST_POSITION = 0  # see RunPlaces
SOURCE = 1  # the row itself where it runs the layer, else -1
FIRST_BLOCK = 2  # see RunPlaces; there only where layers may have block tables of their own
ONE_TOKEN = 1  # length of rows that skip a layer: their output is dropped, and no kernel sees a length of 0


class DecodeBuffers:
    """The buffers of all graphs; a batch size uses the front of each.

    Per layer and row: first_position and source as the op layer_slots and scatter_rows take them, slots, lengths; with
    `moves_first_blocks` also first_block, and a block table that begins there.

    num_blocks: entries of the block table of one unit. num_units: whose tables lie side by side; 1 in the dense layout.
    """

    def __init__(
        self, backbone: "RoutedBackbone", most_rows: int, num_blocks: int, moves_first_blocks: bool, num_units: int = 1
    ) -> None:
        norm = backbone.norm.weight
        self.device, num_layers = norm.device, len(backbone.layers)
        new = partial(torch.zeros, device=self.device)
        self.num_layers = num_layers
        self.input_ids = new(most_rows, dtype=torch.int64)
        self.positions = new(most_rows, dtype=torch.int64)
        self.num_units, self.num_blocks = num_units, num_blocks
        self.block_table = new(most_rows, num_units * num_blocks, dtype=torch.int32)
        self.tables = new(num_layers, most_rows, num_blocks, dtype=torch.int32) if moves_first_blocks else None
        self.hidden, self.residual, self.output = new(3, most_rows, len(norm), dtype=norm.dtype).unbind()
        self.rows = torch.arange(most_rows + 1, dtype=torch.int32, device=self.device)
        self.everyone = torch.ones(most_rows, dtype=torch.bool, device=self.device)
        self._entries = torch.arange(num_blocks, dtype=torch.int32, device=self.device)
        self._num_planes = 3 if moves_first_blocks else 2
        self._plan = new(self._num_planes * num_layers * most_rows, dtype=torch.int32).fill_(-1)
        self._slots = new(num_layers * most_rows, dtype=torch.int64).fill_(-1)
        self._lengths = new(num_layers * most_rows, dtype=torch.int32).fill_(ONE_TOKEN)

    def plan(self, size: int) -> torch.Tensor:
        """[2 or 3, num_layers, size]: of each layer and row FIRST_POSITION, SOURCE and perhaps FIRST_BLOCK."""
        return self._plan[: self._num_planes * self.num_layers * size].view(self._num_planes, self.num_layers, size)

    def table(self, size: int, layer: int) -> torch.Tensor:
        """[size, num_blocks], the block table of a layer."""
        return self.block_table[:size] if self.tables is None else self.tables[layer, :size]

    def entries(self, first_block: np.ndarray, table_width: int) -> np.ndarray:
        """Entries of `block_table` for those of a table whose units are table_width entries wide."""
        if self.num_units == 1:
            return first_block
        return first_block // table_width * self.num_blocks + first_block % table_width

    def fill_unit_tables(self, block_table: torch.Tensor, first_block: torch.Tensor, num_blocks: int) -> None:
        """Do what fill_tables does, with KV units: a request has a table for each unit.

        block_table: [num_rows, num_units * any]. first_block: [num_layers, num_rows], see `entries`.
        """
        assert self.tables is not None
        num_rows = len(block_table)
        given = block_table.reshape(num_rows, self.num_units, -1)
        width = min(num_blocks, given.shape[2], self.num_blocks)
        own = self.block_table[:num_rows]
        own.view(num_rows, self.num_units, self.num_blocks)[:, :, :width].copy_(given[:, :, :width])
        at_once = max(1, _MOST_INDICES // (num_rows * width))  # layers
        for start in range(0, self.num_layers, at_once):
            entry = first_block[start : start + at_once, :, None] + self._entries[:width]
            entry.clamp_(max=own.shape[1] - 1)  # after the last block in use any entry will do
            layers = self.tables[start : start + at_once, :num_rows, :width]
            torch.gather(own.expand(len(layers), -1, -1), 2, entry.long(), out=layers)

    def fill_tables(self, block_table: torch.Tensor, first_block: torch.Tensor | None, num_blocks: int) -> None:
        """Take the tables of a step.

        block_table: [num_rows, any]. num_blocks: that rows use.
        first_block: [num_layers, num_rows], for each row 0 or one other number; None: 0 everywhere.
        """
        num_rows, width = len(block_table), min(num_blocks, block_table.shape[1], self.block_table.shape[1])
        self.block_table[:num_rows, :width].copy_(block_table[:, :width])
        if self.tables is None:
            return
        if first_block is None:
            self.tables[:, :num_rows, :width].copy_(block_table[:, :width])
            return
        # A request has two tables: its own, and the part of it from the first block that it does not share (see
        # kv/masked.py). After the last block in use any entry will do.
        own = block_table[:, :width]
        entry = (first_block.amax(0)[:, None] + self._entries[:width]).clamp_(max=width - 1)
        torch.where(first_block[..., None] > 0, own.gather(1, entry.long()), own, out=self.tables[:, :num_rows, :width])

    def slots(self, size: int) -> torch.Tensor:
        """[num_layers, size]"""
        return self._slots[: self.num_layers * size].view(self.num_layers, size)

    def lengths(self, size: int) -> torch.Tensor:
        """[num_layers, size]"""
        return self._lengths[: self.num_layers * size].view(self.num_layers, size)
