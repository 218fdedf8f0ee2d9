"""What the rows that skip a layer go through: its bypass and, under `kv_only`, its K and V. Compiled where layers are.

All layers share one compiled function, which takes a layer's weights as arguments. For K and V it computes three
products in one: of the row's state with the down projection of the bypass and with the layer's K and V projections.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.platforms import current_platform

from vllm_buddy.method.bypass import Bypass, Product, bypass_delta
from vllm_buddy.serving.forward.compiled import LayerFn, compile_ahead, compiles, example_states, most_tokens
from vllm_buddy.serving.forward.direct_call import DirectCall
from vllm_buddy.serving.forward.pipeline import is_here
from vllm_buddy.serving.kv.kv_only import take_kv_weights

logger = init_logger(f"vllm.{__name__}")

_ONEDNN_PRIMITIVES = 32  # numbers of rows for which a packed weight keeps a prepared product, as in vLLM


def bypass_functions(bypass: Bypass, vllm_config: VllmConfig) -> list[LayerFn]:
    """For each layer the function of its bypass, called like a layer; compiled where layers are.

    bypass: of a whole model, in its dtype. The first and the last layer are never skipped and have none: calling their
        entries is an error.
    """
    return [_never_skipped, *bypass_calls(bypass, vllm_config), _never_skipped]


def bypass_calls(bypass: Bypass, vllm_config: VllmConfig) -> list["BypassCall"]:
    """The function of each entry of a bypass, called like a layer. One that is compiled is shared by all."""
    weights = [(_weight(down), _weight(up)) for down, up in zip(bypass.down.unbind(), bypass.up.unbind())]
    products = (weights[0][0].product, weights[0][1].product)

    def step(hidden: Any, residual: Any, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # A row's state is their sum, rounded. The bypass returns its own part and the state apart, so that the next
        # layer adds and rounds them, as the reference does.
        state = hidden + residual
        return bypass_delta(state, down, up, bypass.eps, products), state

    if compiles(vllm_config):
        down, up = (weight.tensor for weight in weights[0])
        step = DirectCall.of(
            compile_ahead(step, example_states(vllm_config, most_tokens(vllm_config)), vllm_config, down, up),
            lambda num_tokens: (*example_states(vllm_config, num_tokens), down, up),
        )

    return [BypassCall(step, down, up) for down, up in weights]


def kv_bypass_functions(layers: Sequence[Any], bypass: Bypass, vllm_config: VllmConfig) -> list[Any] | None:
    """The same for `kv_only`: each also takes the slots where it writes K and V, see KVBypassCall.

    None where layers are not compiled, and for layers of another form than vLLM's plain Llama and Qwen: there the KV
    policy writes K and V.

    layers: of the whole model. Those that are not here have no function: None.
    """
    own = [
        (number, layer, bypass.down[number - 1], bypass.up[number - 1])
        for number, layer in enumerate(layers[1:-1], start=1)
        if is_here(layer)
    ]
    if not compiles(vllm_config) or not own or not all(_is_plain(layer, bypass) for _, layer, _, _ in own):
        return None
    form = _KVForm.of(own[0][1].self_attn)
    parts = [_SkippedWeights.of(layer, down, up) for _, layer, down, up in own]
    step: Callable[..., Any] = partial(_kv_step, form, bypass.eps, parts[0].products)

    def example(num_tokens: int) -> tuple[torch.Tensor, ...]:
        return (torch.arange(num_tokens), *example_states(vllm_config, num_tokens), *parts[0].arguments)

    rows, others = example(most_tokens(vllm_config))[:3], parts[0].arguments
    step = DirectCall.of(compile_ahead(step, rows, vllm_config, *others), example)
    functions: list[Any] = [_never_skipped, *[None] * (len(layers) - 2), _never_skipped]
    for (number, layer, _, _), part in zip(own, parts):
        functions[number] = KVBypassCall(step, part, layer.self_attn.attn)
    return functions


@dataclass(frozen=True)
class BypassCall:
    """One layer's bypass, called like a layer: the function that all bypasses share, on its own weights."""

    step: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    down: "_Weight"
    up: "_Weight"

    def __call__(
        self, _positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.step(hidden, residual, self.down.tensor, self.up.tensor)


@dataclass(frozen=True)
class KVBypassCall:
    """One layer's bypass, which also writes the K and V that `kv_only` leaves of the rows that skip the layer.

    attn: the layer's vLLM attention, whose cache is written.
    """

    step: Callable[..., tuple[torch.Tensor, ...]]
    weights: "_SkippedWeights"
    attn: Any
    writes_kv: ClassVar[bool] = True

    def __call__(
        self,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        slots: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """slots: [num_rows], where each row's K and V go; None: they are not kept."""
        delta, state, key, value = self.step(positions, hidden, residual, *self.weights.arguments)
        if slots is not None:
            attn = self.attn
            attn.impl.do_kv_cache_update(attn, key, value, attn.kv_cache, slots)
        return delta, state


@dataclass(frozen=True)
class _Weight:
    """A matrix of a bypass. tensor: second argument of `product`, after the rows. owner: keeps its memory alive."""

    tensor: torch.Tensor
    product: Product
    owner: Any = None


def _weight(matrix: torch.Tensor) -> _Weight:
    """The matrix [out, in], on CPU in the packed form that vLLM uses for its linear layers.

    torch's own product of a few rows takes two to three times as long, nearly all of it preparation. It is what is left
    where oneDNN has no product for the dtype: fp16 on a CPU without instructions for it. vLLM's layers do the same.
    """
    packed = None
    if current_platform.is_cpu() and ops._supports_onednn:
        try:
            packed = ops.create_onednn_mm(matrix.t(), _ONEDNN_PRIMITIVES)
        except RuntimeError as error:
            logger.warning_once("bypasses use torch's matrix products, which are slower: %s", error)
    if packed is None:
        # A copy: DirectCall tells the inputs of a compiled function apart by their memory.
        return _Weight(matrix.clone(), nn.functional.linear)
    num_out = matrix.shape[0]

    def product(rows: torch.Tensor, handler: torch.Tensor) -> torch.Tensor:
        output = rows.new_empty(rows.shape[0], num_out)
        torch.ops._C.onednn_mm(output, rows, None, handler)
        return output

    return _Weight(packed.handler_tensor, product, packed)


@dataclass(frozen=True)
class _KVForm:
    """What all layers of a model have in common. kv_size: numbers in K of one token, on this rank."""

    kv_size: int
    head_size: int
    rotary_dim: int
    is_neox_style: bool
    has_bias: bool
    has_norm: bool

    @classmethod
    def of(cls, attention: Any) -> "_KVForm":
        """The form of vLLM's LlamaAttention, Qwen2Attention or Qwen3Attention."""
        rotary = attention.rotary_emb
        has_bias, has_norm = attention.qkv_proj.bias is not None, hasattr(attention, "k_norm")
        return cls(attention.kv_size, rotary.head_size, rotary.rotary_dim, rotary.is_neox_style, has_bias, has_norm)


@dataclass(frozen=True)
class _SkippedWeights:
    """The weights of one skipped layer.

    down_kv: [rank + 2 * kv_size, hidden_size], the down projection of the bypass above K's and V's, whose columns
        include the weight of the layer's norm. extras: the cache of the rotary embedding and, where the model has them,
        the bias of K and V and the weight of K's norm.
    """

    down_kv: _Weight
    up: _Weight
    extras: tuple[torch.Tensor, ...]

    @property
    def products(self) -> tuple[Product, Product]:
        return self.down_kv.product, self.up.product

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """After (positions, hidden, residual), in the order of `_kv_step`."""
        return (self.down_kv.tensor, self.up.tensor, *self.extras)

    @classmethod
    def of(cls, layer: Any, down: torch.Tensor, up: torch.Tensor) -> "_SkippedWeights":
        attention = layer.self_attn
        kv = take_kv_weights(layer).float() * layer.input_layernorm.weight.float()
        extras = [attention.rotary_emb._match_cos_sin_cache_dtype(down)]
        if attention.qkv_proj.bias is not None:
            extras.append(attention.qkv_proj.bias.data[attention.q_size :].clone())
        if hasattr(attention, "k_norm"):
            extras.append(attention.k_norm.weight.data)
        return cls(_weight(torch.cat([down, kv.to(down)])), _weight(up), tuple(extras))


def _kv_step(
    form: _KVForm,
    eps: float,
    products: tuple[Product, Product],
    positions: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor,
    down_kv: torch.Tensor,
    up: torch.Tensor,
    cos_sin: torch.Tensor,
    *extras: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the bypass adds, the state before it, and the layer's K and V [num_rows, num_kv_heads, head_size]."""
    state = hidden + residual
    normed = nn.functional.rms_norm(state, state.shape[-1:], eps=eps)
    both = products[0](normed, down_kv)
    rank = both.shape[-1] - 2 * form.kv_size
    delta = products[1](nn.functional.silu(both[:, :rank]), up)
    key, value = both[:, rank:].split([form.kv_size, form.kv_size], dim=-1)
    if form.has_bias:
        key, value = key + extras[0][: form.kv_size], value + extras[0][form.kv_size :]
    heads = (-1, form.head_size)
    if form.has_norm:
        key = nn.functional.rms_norm(key.unflatten(-1, heads), (form.head_size,), extras[-1], eps).flatten(-2)
    key, _ = RotaryEmbedding.forward_static(
        positions, key.contiguous(), None, form.head_size, form.rotary_dim, cos_sin, form.is_neox_style
    )
    return delta, state, key.unflatten(-1, heads), value.contiguous().unflatten(-1, heads)


def _is_plain(layer: Any, bypass: Bypass) -> bool:
    """Whether `_kv_step` computes what the layer does: its norms, its rotary embedding and weights that can be cut."""
    attention = layer.self_attn
    norms = [layer.input_layernorm, *([attention.k_norm] if hasattr(attention, "k_norm") else [])]
    return (
        hasattr(attention.qkv_proj, "buddy_kv_weight")
        and type(attention.rotary_emb).forward_native is RotaryEmbedding.forward_native
        and all(norm.variance_epsilon == bypass.eps for norm in norms)
    )


def _never_skipped(*_: Any) -> Any:
    raise RuntimeError("the first and the last layer are never skipped")
