"""How vLLM works inside, where the plugin relies on it without a call that would fail."""

import inspect
from typing import Any

import pytest

from vllm_buddy.serving.compat import units_problem


def test_sampling_of_drafts_still_needs_to_be_mended() -> None:
    """Fails if vLLM's CPU kernel copies its result back: then the change can go. Or if ours computes something else."""
    import torch
    from vllm.platforms import current_platform
    from vllm.utils import cpu_triton_utils
    from vllm.v1.sample.ops import topk_topp_sampler

    from vllm_buddy.serving.compat import _apply_top_k_top_p, _expand_batch_to_tokens

    values, ends = torch.tensor([0.0, 0.7, 1.5]), torch.tensor([2, 2, 5], dtype=torch.int32)
    assert _expand_batch_to_tokens(values, ends, 5, 0, 1).tolist() == pytest.approx([1.0, 1.0, 1.5, 1.5, 1.5])
    assert _expand_batch_to_tokens(torch.tensor([3, 4, 5]), ends, 5).tolist() == [3, 3, 5, 5, 5]
    if current_platform.is_cpu():
        result = torch.full((5,), -1.0)
        cpu_triton_utils._expand_kernel_impl(result, values, ends, 0, 1)
        assert result.tolist() == [-1.0] * 5
        none = torch.empty(0, 8)
        with pytest.raises(RuntimeError):
            topk_topp_sampler.apply_top_k_top_p(none, torch.empty(0, dtype=torch.int32), None)
        assert _apply_top_k_top_p(none, torch.empty(0, dtype=torch.int32), None) is none


def test_a_request_hashes_its_blocks_the_way_we_cut_them() -> None:
    """Fails if Request keeps its hashes or its hasher elsewhere: the chain would not end where the path does."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    from vllm_buddy.serving.schedule.prefix_cache import end_hash_chain, salt

    def hasher(request: Request) -> list[Any]:
        return [(request.cache_salt, i) for i in range(len(request.block_hashes), request.num_tokens // 4)]

    request = Request("r", list(range(10)), SamplingParams(max_tokens=8), None, block_hasher=hasher)
    assert request.block_hashes == [(None, 0), (None, 1)]
    salt(request, "path")
    assert [block for _, block in request.block_hashes] == [0, 1]
    assert all("path" in block_salt for block_salt, _ in request.block_hashes)
    end_hash_chain(request, 1)
    request.append_output_token_ids([1] * 8)
    assert len(request.block_hashes) == 1


def test_all_publishing_goes_through_the_coordinator() -> None:
    """Fails if vLLM publishes blocks by another way than the one that is limited to one path."""
    from vllm.v1.core import kv_cache_coordinator, kv_cache_manager
    from vllm.v1.core.sched import async_scheduler, scheduler

    manager = inspect.getsource(kv_cache_manager)
    assert manager.count(".cache_blocks(") == manager.count("self.coordinator.cache_blocks(request, num_") == 2
    for module in (scheduler, async_scheduler):
        source = inspect.getsource(module)
        assert source.count(".cache_blocks(") == source.count("self.kv_cache_manager.cache_blocks(")
    assert "cache_full_blocks" not in inspect.getsource(kv_cache_coordinator) + manager


def test_the_coordinator_has_no_method_that_units_forget() -> None:
    """Fails if vLLM's coordinator gives or takes blocks by a new method, which would see the groups of all units."""
    if reason := units_problem():
        pytest.skip(reason)
    from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, KVCacheCoordinator

    methods = {n for c in (KVCacheCoordinator, HybridKVCacheCoordinator) for n, f in vars(c).items() if callable(f)}
    # What is not overridden works on the lists of blocks that a request has, or on no request.
    assert {name for name in methods if not name.startswith("_")} == {
        "allocate_new_blocks",
        "allocate_new_computed_blocks",
        "cache_blocks",
        "emit_cached_block_events",
        "find_longest_cache_hit",
        "find_longest_cache_hit_per_group",
        "free",
        "get_blocks",
        "get_num_blocks_to_allocate",
        "get_num_cacheable_tokens",
        "new_step_starts",
        "pop_blocks_for_free",
        "remove_skipped_blocks",
        "reset_prefix_cache",
        "verify_and_split_kv_cache_groups",
    }


def test_the_block_tables_have_no_method_that_unit_tables_forget() -> None:
    """Fails if vLLM fills or copies block tables by a new method, which would not know that units share a buffer."""
    if reason := units_problem():
        pytest.skip(reason)
    from vllm.v1.worker.block_table import MultiGroupBlockTable

    # What UnitTables does not override works row by row on the table of each group.
    by_row = {"append_row", "add_row", "clear_row", "move_row", "swap_row", "clear"}
    methods = {name for name, value in vars(MultiGroupBlockTable).items() if callable(value) and name[0] != "_"}
    assert methods == {*by_row, "compute_slot_mapping", "commit_block_table"}
