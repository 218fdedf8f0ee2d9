"""vLLM's compilation, one decoder layer at a time.

vLLM compiles the whole model as one graph, which fixes the list of layers. A graph per layer serves every path and
batch size. The graphs of the layers are alike, so the compiler's caches make all but the first two cheap. The bypasses
share one graph, which takes their weights as arguments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.config import CompilationMode, VllmConfig
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.platforms import current_platform

from vllm_buddy.method.bypass import Bypass, Product, bypass_delta
from vllm_buddy.serving.forward.direct_call import DirectCall

# (positions, hidden_states, residual) -> (hidden_states, residual)
LayerFn = Callable[..., tuple[torch.Tensor, torch.Tensor]]
NormFn = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_ONEDNN_PRIMITIVES = 32  # numbers of rows a packed weight is prepared for at a time, as in vLLM


def layer_functions(layers: Sequence[nn.Module], first_layer: int, vllm_config: VllmConfig) -> list[LayerFn]:
    """Forward functions (positions, hidden_states, residual) -> (hidden_states, residual) of decoder layers.

    Compiled for any number of tokens where vLLM's mode says so (the default on CPU), else the layers themselves.

    layers: vLLM decoder layers. first_layer: index of layers[0] in the model; layer 0 gets no residual.
    """
    if not _compiles(vllm_config):
        return list(layers)
    return [
        _compile_layer(layer, vllm_config, with_residual=index > 0)
        for index, layer in enumerate(layers, start=first_layer)
    ]


def norm_function(norm: nn.Module, vllm_config: VllmConfig) -> NormFn:
    """The model's last norm, (hidden_states, residual) -> (normed, their sum); compiled where layers are.

    norm: a vLLM RMSNorm. Uncompiled it is half a dozen small operations of torch.
    """
    if not _compiles(vllm_config):
        return norm.forward  # not the module: the model that keeps it would take it for one of its own
    compiled = _compile(norm.forward, _states(vllm_config, _most_tokens(vllm_config)), vllm_config)
    return DirectCall.of(partial(compiled, norm), partial(_states, vllm_config))


def bypass_functions(bypass: Bypass, vllm_config: VllmConfig) -> list[LayerFn]:
    """What takes the place of each layer for rows that skip it, in the form of a layer; compiled where layers are.

    bypass: of a whole model, in its dtype. The first and the last layer, which no row skips, have none: calling their
        entries is an error.
    """
    weights = [(_weight(down), _weight(up)) for down, up in zip(bypass.down.unbind(), bypass.up.unbind())]
    products = (weights[0][0].product, weights[0][1].product)

    def step(hidden: Any, residual: Any, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # A row's state is their sum, rounded. Left as a sum with what the bypass adds, it is rounded by the next layer
        # as the reference rounds it.
        state = hidden + residual
        return bypass_delta(state, down, up, bypass.eps, products), state

    if _compiles(vllm_config):
        down, up = (weight.tensor for weight in weights[0])
        step = DirectCall.of(
            _compile(step, _states(vllm_config, _most_tokens(vllm_config)), vllm_config, down, up),
            lambda num_tokens: (*_states(vllm_config, num_tokens), down, up),
        )

    return [_never_skipped, *(BypassCall(step, down, up) for down, up in weights), _never_skipped]


@dataclass(frozen=True)
class BypassCall:
    """One layer's bypass in the form of a layer: the function that all share, on its weights."""

    step: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    down: "_Weight"
    up: "_Weight"

    def __call__(
        self, _positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.step(hidden, residual, self.down.tensor, self.up.tensor)


@dataclass(frozen=True)
class _Weight:
    """A matrix of a bypass. tensor: as `product` takes it behind the rows. owner: what keeps its memory."""

    tensor: torch.Tensor
    product: Product
    owner: Any = None


def _weight(matrix: torch.Tensor) -> _Weight:
    """On CPU in the packed form that vLLM has for its linear layers: torch's own product of a few rows is two to three
    times as slow, nearly all of it preparation.

    matrix: [out, in].
    """
    if not (current_platform.is_cpu() and ops._supports_onednn):
        # A copy, since inputs of compiled functions are told apart by their memory.
        return _Weight(matrix.clone(), nn.functional.linear)
    packed, num_out = ops.create_onednn_mm(matrix.t(), _ONEDNN_PRIMITIVES), matrix.shape[0]

    def product(rows: torch.Tensor, handler: torch.Tensor) -> torch.Tensor:
        output = rows.new_empty(rows.shape[0], num_out)
        torch.ops._C.onednn_mm(output, rows, None, handler)
        return output

    return _Weight(packed.handler_tensor, product, packed)


def _never_skipped(*_: Any) -> Any:
    raise RuntimeError("the first and the last layer are never skipped")


def _compiles(vllm_config: VllmConfig) -> bool:
    config = vllm_config.compilation_config
    # vLLM's CI setting asks for tracing without a compiler behind it, which is the layer itself.
    return config.mode == CompilationMode.DYNAMO_TRACE_ONCE and config.backend != "eager"


def _compile_layer(layer: Any, vllm_config: VllmConfig, *, with_residual: bool) -> LayerFn:
    def example(num_tokens: int) -> tuple[Any, ...]:
        hidden, residual = _states(vllm_config, num_tokens)
        return torch.arange(num_tokens), hidden, residual if with_residual else None

    # Without metadata attention neither writes to the cache nor reads it.
    with override_forward_context(create_forward_context(None, vllm_config)):
        function = _compile(layer.forward, example(_most_tokens(vllm_config)), vllm_config)
        with patch.object(layer.self_attn.attn.impl, "forward", _attend_to_itself):
            return DirectCall.of(partial(function, layer), example)


def _compile(
    function: Callable[..., Any], rows: tuple[Any, ...], vllm_config: VllmConfig, *others: torch.Tensor
) -> Callable[..., Any]:
    """Compile a function ahead of its first use, as vLLM compiles a model: one trace, no guards.

    rows: its first arguments, tensors (or None) with any number of rows. others: those of fixed shape.
    """
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    options |= vllm_config.compilation_config.inductor_compile_config
    backend = vllm_config.compilation_config.init_backend(vllm_config)
    for tensor in rows:
        if tensor is not None:
            torch._dynamo.mark_dynamic(tensor, 0)
    with torch._dynamo.config.patch(enable_aot_compile=True):
        compiled: Any = torch.compile(function, fullgraph=True, dynamic=False, backend=backend, options=options)
        ahead = compiled.aot_compile(((*rows, *others), {}))
        ahead.disable_guard_check()
        return ahead


def _attend_to_itself(_layer: Any, query: torch.Tensor, *_: Any, output: torch.Tensor, **__: Any) -> torch.Tensor:
    """Stands in for attention while there is no cache: without metadata the output would be left uninitialised."""
    return output.copy_(query)


def _states(vllm_config: VllmConfig, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random hidden states and residual: each [num_tokens, hidden_size]."""
    model = vllm_config.model_config
    hidden, residual = torch.randn(2, num_tokens, model.get_hidden_size(), dtype=model.dtype).unbind()
    return hidden, residual


def _most_tokens(vllm_config: VllmConfig) -> int:
    """Of a step; two at least, since a trace on one row would be of one row only."""
    return max(2, vllm_config.scheduler_config.max_num_batched_tokens)
