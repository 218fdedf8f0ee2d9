"""The block tables of all KV units as one, for vLLM's model runner V1."""

import copy

import torch
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker.block_table import MultiGroupBlockTable


class UnitTables(MultiGroupBlockTable):
    """Block tables of equally many blocks, side by side in one buffer, so that one copy brings all to the device.

    vLLM computes the slots of each KV-cache group in every step. Here nothing reads them: layers have their own.

    tables: of all groups, empty.
    """

    def __init__(self, tables: MultiGroupBlockTable) -> None:
        self.block_tables = tables.block_tables
        first = tables[0]
        width = first.max_num_blocks_per_req
        self._all = first._make_buffer(first.max_num_reqs, len(self.block_tables) * width, dtype=torch.int32)
        for unit, table in enumerate(self.block_tables):
            table.block_table = _columns(self._all, slice(unit * width, (unit + 1) * width))

    def side_by_side(self, num_reqs: int) -> torch.Tensor:
        """[num_reqs, num_units * blocks of a request], on the device; see StepBatch."""
        return self._all.gpu[:num_reqs]

    def commit_block_table(self, num_reqs: int) -> None:
        """Bring the tables of the first num_reqs rows to the device."""
        self._all.copy_to_gpu(num_reqs)

    def compute_slot_mapping(self, *_args: object, **_kwargs: object) -> None:
        """Nothing."""


def _columns(buffer: CpuGpuBuffer, columns: slice) -> CpuGpuBuffer:
    """A part of a buffer, in the same memory."""
    part = copy.copy(buffer)
    part.cpu, part.gpu, part.np = buffer.cpu[:, columns], buffer.gpu[:, columns], buffer.np[:, columns]
    return part
