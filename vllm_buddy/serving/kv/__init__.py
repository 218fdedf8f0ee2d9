"""KV policies: what a token leaves in the paged KV cache of a layer that it skips.

`base.py` has the interface, `masked.py`, `kv_only.py` and `zero.py` one policy each, `packed.py` and `aligned.py` the
two layouts of the cache that they use.
"""

from vllm_buddy.method.kv_policy import KVPolicyName
from vllm_buddy.serving.kv.base import KVPolicy, LayerView
from vllm_buddy.serving.kv.kv_only import KVOnly
from vllm_buddy.serving.kv.masked import Masked
from vllm_buddy.serving.kv.zero import Zero

POLICIES: dict[KVPolicyName, type[KVPolicy]] = {policy.name: policy for policy in (Masked, KVOnly, Zero)}

__all__ = ["POLICIES", "KVPolicy", "LayerView"]
