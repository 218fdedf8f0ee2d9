"""KV policies: what a skipped layer leaves in the paged cache. One interface, one file each."""

from vllm_buddy.serving.kv.base import KVPolicy, LayerView
from vllm_buddy.serving.kv.kv_only import KVOnly
from vllm_buddy.serving.kv.masked import Masked
from vllm_buddy.serving.kv.zero import Zero

POLICIES: dict[str, type[KVPolicy]] = {policy.name: policy for policy in (Masked, KVOnly, Zero)}

__all__ = ["POLICIES", "KVPolicy", "LayerView"]
