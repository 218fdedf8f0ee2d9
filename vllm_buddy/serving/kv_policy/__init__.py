"""KV policies: what a skipped layer leaves in the paged cache. One interface, one file each."""

from vllm_buddy.serving.kv_policy.base import KVPolicy, LayerView
from vllm_buddy.serving.kv_policy.kv_only import KVOnly
from vllm_buddy.serving.kv_policy.masked import Masked
from vllm_buddy.serving.kv_policy.zero import Zero

POLICIES: dict[str, type[KVPolicy]] = {policy.name: policy for policy in (Masked, KVOnly, Zero)}

__all__ = ["POLICIES", "KVPolicy", "LayerView"]
