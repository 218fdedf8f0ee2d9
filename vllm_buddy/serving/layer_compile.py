"""vLLM's compilation, one decoder layer at a time.

vLLM compiles the whole model as one graph, which fixes the list of layers. A graph per layer serves every path and
batch size. The graphs of the layers are alike, so the compiler's caches make all but the first two cheap.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationMode, VllmConfig
from vllm.forward_context import create_forward_context, override_forward_context

LayerFn = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def layer_functions(layers: Sequence[nn.Module], first_layer: int, vllm_config: VllmConfig) -> list[LayerFn]:
    """Forward functions (positions, hidden_states, residual) -> (hidden_states, residual) of decoder layers.

    Compiled for any number of tokens where vLLM's mode says so (the default on CPU), else the layers themselves.

    layers: vLLM decoder layers. first_layer: index of layers[0] in the model; layer 0 gets no residual.
    """
    if vllm_config.compilation_config.mode != CompilationMode.DYNAMO_TRACE_ONCE:
        return list(layers)
    # vLLM drops all guards after one trace, and so does this: one function, one layer, one graph.
    with torch._dynamo.config.patch(recompile_limit=max(64, 2 * len(layers))):
        functions = [_compiled(layer, vllm_config) for layer in layers]
        for index, function in enumerate(functions, start=first_layer):
            _trace(function, vllm_config, with_residual=index > 0)
    return functions


def _compiled(layer: nn.Module, vllm_config: VllmConfig) -> LayerFn:
    forward = type(layer).forward
    # Dynamo keeps compiled graphs by code object; without guards two layers must not share one.
    code = forward.__code__.replace()
    own = types.FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    config = vllm_config.compilation_config
    backend = config.init_backend(vllm_config)
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    if backend == "inductor":
        options |= config.inductor_compile_config
    return torch.compile(
        types.MethodType(own, layer), fullgraph=True, dynamic=False, backend=backend, options=options
    )


def _trace(function: LayerFn, vllm_config: VllmConfig, *, with_residual: bool) -> None:
    """Compile `function` on an example of the largest batch, with the number of tokens left open."""
    num_tokens = max(2, vllm_config.scheduler_config.max_num_batched_tokens)
    config = vllm_config.model_config
    shape = (num_tokens, config.get_hidden_size())
    positions = torch.zeros(num_tokens, dtype=torch.int64)
    hidden = torch.zeros(shape, dtype=config.dtype)
    residual = torch.zeros(shape, dtype=config.dtype) if with_residual else None
    for tensor in (positions, hidden, residual):
        if tensor is not None:
            torch._dynamo.mark_dynamic(tensor, 0)
    # Without metadata attention neither writes to the cache nor reads it.
    with override_forward_context(create_forward_context(None, vllm_config)), torch.inference_mode():
        function(positions, hidden, residual)
