"""`kv_only`: a skipped layer still projects K and V from the hidden state that passes it.

Every position stays visible to attention, at the cost of two small projections per skipped layer.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform

from vllm_buddy.method.kv_policy import KV_ONLY, KVPolicyName
from vllm_buddy.serving.kv.aligned import Aligned

logger = init_logger(f"vllm.{__name__}")


class KVOnly(Aligned):
    """Writes norm -> K, V projections -> (K norm) -> RoPE of the skipped rows."""

    name: ClassVar[KVPolicyName] = KV_ONLY
    writes_skipped: ClassVar[bool] = True
    in_graphs: ClassVar[bool] = True

    def write_skipped(
        self, layer: Any, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None, slots: Any
    ) -> None:
        attention, attn = layer.self_attn, layer.self_attn.attn
        # Of copies, because vLLM's norms work in place.
        if residual is None:
            normed = layer.input_layernorm(hidden.clone())
        else:
            normed, _ = layer.input_layernorm(hidden.clone(), residual.clone())
        key, value = self._project(attention, normed)
        if hasattr(attention, "k_norm"):
            key = attention.k_norm(key.view(-1, attn.num_kv_heads, attn.head_size)).view(key.shape)
        key, _ = attention.rotary_emb(positions, key)
        key = key.view(-1, attn.num_kv_heads, attn.head_size)
        value = value.reshape(-1, attn.num_kv_heads, attn.head_size)
        attn.impl.do_kv_cache_update(attn, key, value, attn.kv_cache, slots)

    @staticmethod
    def _project(attention: Any, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        qkv_proj = attention.qkv_proj
        if hasattr(qkv_proj, "buddy_kv_weight"):
            bias = None if qkv_proj.bias is None else qkv_proj.bias[attention.q_size :]
            kv = torch.nn.functional.linear(normed, qkv_proj.buddy_kv_weight, bias)
        else:  # quantised weights are packed and cannot be cut
            kv = qkv_proj(normed)[0][:, attention.q_size :]
        key, value = kv.split([attention.kv_size, attention.kv_size], dim=-1)
        return key.contiguous(), value


def keep_kv_weights(layer: Any) -> None:
    """Keep the K and V rows of an unquantised layer's projection at hand. To be called after its weights are loaded.

    A view on a GPU. On CPU vLLM packs the weight for its matrix product and drops the original, so the rows are
    copied: 2 * kv_size * hidden_size numbers a layer.
    """
    attention = layer.self_attn
    qkv_proj = attention.qkv_proj
    if isinstance(qkv_proj.quant_method, UnquantizedLinearMethod):
        rows = qkv_proj.weight.data[attention.q_size :]
        qkv_proj.buddy_kv_weight = rows.clone() if current_platform.is_cpu() else rows


def keep_missing_kv_weights(layers: Iterable[Any]) -> None:
    """The same for layers whose weights a loader fills in itself, as --load-format dummy and sharded_state do.

    To be called when the weights have their final form. On a GPU they can still be had; on CPU they are packed, and
    the whole QKV product is computed for skipped rows, with a warning.
    """
    lacking = [layer for layer in layers if _lacks_rows(layer.self_attn.qkv_proj)]
    if lacking and current_platform.is_cpu():
        logger.warning(
            'KV policy "kv_only" projects queries too for rows that skip a layer, which is slower: this --load-format '
            "leaves K and V projections of the layers packed with them"
        )
        return
    for layer in lacking:
        keep_kv_weights(layer)


def _lacks_rows(qkv_proj: Any) -> bool:
    """Whether rows of a projection can be kept, and are not."""
    return isinstance(qkv_proj.quant_method, UnquantizedLinearMethod) and not hasattr(qkv_proj, "buddy_kv_weight")


def take_kv_weights(layer: Any) -> torch.Tensor:
    """What `keep_kv_weights` kept, [2 * kv_size, hidden_size], for one who keeps it in another form."""
    qkv_proj = layer.self_attn.qkv_proj
    rows = qkv_proj.buddy_kv_weight
    del qkv_proj.buddy_kv_weight
    return rows
