"""Prefix caching of routed requests: which blocks a request may publish, and which requests may find them.

The KV of a token depends on the paths of all tokens before it. So cached blocks are shared within one path only: block
hashes are salted with (artifact, KV policy, path of the prompt), and a request publishes and looks up only blocks whose
tokens, and all tokens before them, ran that one path. Requests at full depth carry no salt and share blocks with all
others at full depth, as in stock vLLM.
"""

from collections.abc import Callable
from typing import Any

from vllm.v1.request import Request

from vllm_buddy.serving.compat import BlockHasher, rehash_blocks, stop_hashing

TokenLimit = Callable[[Request, int], int]


def salt(request: Request, key: str | None, hasher: BlockHasher | None = None) -> None:
    """Make `key` part of the request's block hashes, beside a salt that the user may have sent.

    None: no key, and none of an earlier one. hasher: of a chain of hashes that was ended, and begins again. The request
    has no blocks yet.
    """
    users = request.cache_salt[0] if isinstance(request.cache_salt, tuple) else request.cache_salt
    # A pair, not a string: a user can send any string, so a string could be made to reach the blocks of a path.
    salted = users if key is None else (users, key)
    if hasher is not None or salted != request.cache_salt:
        rehash_blocks(request, salted, hasher)


def end_hash_chain(request: Request, num_blocks: int) -> BlockHasher | None:
    """Keep the hashes of the first num_blocks blocks and add no more, because what follows ran another path.

    Otherwise a request that resumes after a preemption could find blocks beyond its change of path, published by a
    request that has the same tokens in its prompt.

    Returns:
        What made the hashes; None if there was none, as where the chain was ended before.
    """
    return stop_hashing(request, num_blocks)


def limit_publishing(coordinator: Any, limit: TokenLimit) -> None:
    """Publish only the first limit(request, num_tokens) tokens of a request.

    coordinator: vLLM's KVCacheCoordinator. All publishing goes through its cache_blocks: when slots are allocated and,
        under asynchronous scheduling, when tokens arrive.
    """
    publish = coordinator.cache_blocks

    def cache_blocks(request: Request, num_computed_tokens: int, *args: Any, **kwargs: Any) -> None:
        publish(request, limit(request, num_computed_tokens), *args, **kwargs)

    coordinator.cache_blocks = cache_blocks
