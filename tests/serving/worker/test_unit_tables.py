"""The block tables of all KV units in one buffer, against tables that vLLM keeps one by one. No engine."""

import torch
from vllm.v1.worker.block_table import MultiGroupBlockTable

from vllm_buddy.serving.worker.unit_tables import UnitTables

NUM_UNITS, MAX_REQS, MAX_BLOCKS, BLOCK_SIZE = 3, 5, 16, 32


def tables() -> MultiGroupBlockTable:
    return MultiGroupBlockTable(
        max_num_reqs=MAX_REQS,
        max_num_batched_tokens=64,
        pin_memory=False,
        device=torch.device("cpu"),
        block_sizes=[BLOCK_SIZE] * NUM_UNITS,
        max_num_blocks=[MAX_BLOCKS] * NUM_UNITS,
    )


def change(block_tables: MultiGroupBlockTable) -> None:
    """What vLLM's input batch does with requests that come, grow, move and go."""
    for row in range(MAX_REQS):
        block_tables.add_row(([10 + row, 20 + row], [], [30 + row]), row)
    block_tables.append_row(([40], [], [41, 42]), 1)
    block_tables.swap_row(0, 3)
    block_tables.clear_row(2)
    block_tables.move_row(4, 2)


def test_blocks_lie_where_vllm_put_them_with_the_units_side_by_side() -> None:
    """Fails if a request reads the blocks of another row or unit, or of the step before."""
    plain, units = tables(), UnitTables(tables())
    for block_tables in (plain, units):
        change(block_tables)
        block_tables.commit_block_table(4)
    wanted = [table.get_device_tensor(4) for table in plain.block_tables]
    assert torch.equal(units.side_by_side(4), torch.cat(wanted, dim=1))
    for table, expected in zip(units.block_tables, wanted):
        assert torch.equal(table.get_device_tensor(4), expected)
        assert (table.get_numpy_array()[:4] == expected.numpy()).all()
    units.clear()
    assert not units.side_by_side(MAX_REQS).any()


def test_vllm_computes_no_slots() -> None:
    """Fails if each step pays for the slots of all KV-cache groups, which nothing reads."""
    units = UnitTables(tables())
    change(units)
    units.compute_slot_mapping(1, torch.tensor([0, 1], dtype=torch.int32), torch.tensor([33]))
    assert not any(table.slot_mapping.gpu.any() for table in units.block_tables)
