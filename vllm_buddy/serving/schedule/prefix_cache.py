"""Prefix caching of routed requests: what may be published, and to whom.

The KV of a token depends on the paths of all tokens before it. So cached blocks are shared within one path only:
block hashes are salted with (artifact, KV policy, path of the prompt), and a request publishes and looks up only
the blocks whose tokens, and all tokens before them, ran that one path. Requests at full depth carry no salt and
share with all others at full depth, as in stock vLLM.
"""

from collections.abc import Callable
from typing import Any

from vllm.v1.request import Request

TokenLimit = Callable[[Request, int], int]


def salt(request: Request, key: str) -> None:
    """Make `key` part of the request's block hashes, beside a salt of the user's own."""
    # A pair and not a string: a user can send any string, this one's too, and must not reach a path's blocks with it.
    request.cache_salt = (request.cache_salt, key)
    # vLLM hashed the prompt in the constructor, before the path was known.
    request.block_hashes = []
    request.update_block_hashes()


def end_hash_chain(request: Request, num_blocks: int) -> None:
    """Keep the hashes of the first num_blocks blocks and add no more.

    What follows ran another path. Without this a request resumed after a preemption could find blocks beyond
    its change of path, published by a request that has the same tokens in its prompt.
    """
    del request.block_hashes[num_blocks:]
    request._block_hasher = None


def limit_publishing(coordinator: Any, limit: TokenLimit) -> None:
    """Publish only the first limit(request, num_tokens) tokens of a request.

    coordinator: vLLM's KVCacheCoordinator, through which all publishing goes (when slots are allocated and,
        under asynchronous scheduling, when tokens arrive).
    """
    publish = coordinator.cache_blocks

    def cache_blocks(request: Request, num_computed_tokens: int, *args: Any, **kwargs: Any) -> None:
        publish(request, limit(request, num_computed_tokens), *args, **kwargs)

    coordinator.cache_blocks = cache_blocks
