"""`zero`: a skipped layer writes zeros, as the paper does. A zero key has logit 0, so it takes attention mass."""

from typing import Any, ClassVar

from vllm_buddy.method.kv_policy import ZERO, KVPolicyName
from vllm_buddy.serving.kv.aligned import Aligned


class Zero(Aligned):
    """For reproduction of the paper's numbers."""

    name: ClassVar[KVPolicyName] = ZERO
    writes_skipped: ClassVar[bool] = True
    in_graphs: ClassVar[bool] = False  # a row that ran through the layer would leave what it computed

    def write_skipped(self, layer: Any, positions: Any, hidden: Any, residual: Any, slots: Any) -> None:  # noqa: ARG002
        attn = layer.self_attn.attn
        zeros = hidden.new_zeros(len(slots), attn.num_kv_heads, attn.head_size)
        attn.impl.do_kv_cache_update(attn, zeros, zeros, attn.kv_cache, slots)
