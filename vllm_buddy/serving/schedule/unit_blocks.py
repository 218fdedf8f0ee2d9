"""vLLM's KV cache manager for KV units: a request takes blocks of the KV-cache groups of its own units only.

vLLM allocates blocks of every group for every request. Unit j is group j here, so the coordinator asks which units a
request takes. It does so for all tokens that are about to get slots, because a path may change within a step.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from vllm.v1.core.kv_cache_coordinator import (
    HybridKVCacheCoordinator,
    KVCacheCoordinator,
    KVCacheCoordinatorNoPrefixCache,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_buddy.serving.schedule.request_units import RequestUnits

# The units of a request, by its id, for its first num_tokens tokens.
UnitsOf = Callable[[str, int], RequestUnits]


def use_units(manager: KVCacheManager, units_of: UnitsOf) -> None:
    """Let a scheduler's KV cache manager allocate by units. To be called before there is a request."""
    coordinator: Any = manager.coordinator
    caching = isinstance(coordinator, HybridKVCacheCoordinator)
    coordinator.__class__ = UnitCoordinator if caching else UnitCoordinatorNoPrefixCache
    coordinator.units_of = units_of
    coordinator.looked_up = ""
    coordinator.covered = {}
    manager.__class__ = UnitManager


class _ByUnits(KVCacheCoordinator):
    """What both coordinators below do.

    units_of: see UnitsOf. looked_up: the request whose prefix is looked up.
    covered: by request id, how many blocks of each unit it has, for the common case that a step needs no new one.
    """

    units_of: UnitsOf
    looked_up: str
    covered: dict[str, list[int]]

    @property
    def _block_size(self) -> int:
        return self.single_type_managers[0].block_size

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: tuple[Sequence[KVCacheBlock], ...],
        *_args: Any,
        **_kwargs: Any,
    ) -> int:
        """Blocks that the request's units lack for num_tokens, found ones that nobody holds included."""
        units = self.units_of(request_id, num_tokens)
        needed = units.num_blocks(num_tokens)
        if self.covered.get(request_id) == needed:
            return 0
        lacking = 0
        for manager, need, first, found in zip(
            self.single_type_managers, needed, units.first_blocks, new_computed_blocks
        ):
            held = len(manager.req_to_blocks.get(request_id, ())) + len(found)
            lacking += max(0, need - max(first, held)) + manager._get_num_evictable_blocks(found)
        return lacking

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *_args: Any, **_kwargs: Any
    ) -> tuple[list[KVCacheBlock], ...]:
        """Give the request's units blocks for num_tokens. Entries before a unit's first block are the null block."""
        units = self.units_of(request_id, num_tokens)
        needed = units.num_blocks(num_tokens)
        new: list[list[KVCacheBlock]] = [[] for _ in self.single_type_managers]
        if self.covered.get(request_id) == needed:
            return tuple(new)
        for index, (manager, need, first) in enumerate(zip(self.single_type_managers, needed, units.first_blocks)):
            if need > first:
                blocks = manager.req_to_blocks[request_id]
                padding = [self.block_pool.null_block] * (first - len(blocks))
                blocks.extend(padding)
                num_slots = need * self._block_size
                new[index] = padding + manager.allocate_new_blocks(request_id, num_slots, num_slots)
        self.covered[request_id] = needed
        return tuple(new)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Publish full blocks of the units of the request's first path; the caller limits the tokens to that path."""
        first = self.single_type_managers[0]
        published = first.num_cached_block.get(request.request_id, 0)
        if not first.enable_caching or num_computed_tokens // self._block_size <= published:
            return
        units = self.units_of(request.request_id, num_computed_tokens)
        for group_id, manager in enumerate(self.single_type_managers[: units.num_shared]):
            num_tokens = self.get_num_cacheable_tokens(num_computed_tokens, group_id)
            manager.cache_blocks(request, num_tokens, replay_boundaries=())

    def remove_skipped_blocks(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing: no layer has a window."""

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The blocks in order of position. vLLM frees them from the end, so that a prefix is evicted from its end in
        all units alike."""
        self.covered.pop(request_id, None)
        tables = [manager.pop_blocks_for_free(request_id) for manager in self.single_type_managers]
        return [block for blocks in zip_longest(*tables) for block in blocks if block is not None and not block.is_null]

    def free(self, request_id: str) -> None:
        """Free the request's blocks, see pop_blocks_for_free."""
        self.block_pool.free_blocks(reversed(self.pop_blocks_for_free(request_id)))

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        """The longest prefix that is found in all units of the first path of the request that is looked up."""
        num_shared = self.units_of(self.looked_up, 0).num_shared
        first = self.single_type_managers[0]
        blocks, num_tokens = FullAttentionManager.find_longest_cache_hit(
            block_hashes=block_hashes,
            max_length=max_cache_hit_length,
            kv_cache_group_ids=list(range(num_shared)),
            block_pool=self.block_pool,
            kv_cache_spec=first.kv_cache_spec,
            drop_eagle_block=False,
            alignment_tokens=self.scheduler_block_size,
        )
        others: list[list[KVCacheBlock]] = [[] for _ in self.single_type_managers[num_shared:]]
        return (*blocks, *others), num_tokens, 0


class UnitCoordinator(_ByUnits, HybridKVCacheCoordinator):
    """With prefix caching."""


class UnitCoordinatorNoPrefixCache(_ByUnits, KVCacheCoordinatorNoPrefixCache):
    """Without: nothing is looked up or published."""


class UnitManager(KVCacheManager):
    """Says which request it looks up, which vLLM's coordinator does not get to know."""

    coordinator: UnitCoordinator

    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        """The cached prefix of a request."""
        self.coordinator.looked_up = request.request_id
        return super().get_computed_blocks(request)

    def estimate_cached_tokens(self, request: Request) -> int:
        """Tokens of the request that the cache holds, as far as its first unit tells."""
        blocks = self.get_blocks(request.request_id).blocks[0]
        return max((block.block_hash_num_tokens or 0 for block in blocks), default=0)
