"""Compiles decoder layers with vLLM's compiler, one layer at a time.

vLLM compiles the whole model as one graph, which fixes the list of layers. A graph per layer serves every path and
batch size. Layers that are alike share one graph: it is compiled for one of them and bound to the weights of each of
the others (direct_call.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.logger import init_logger

from vllm_buddy.serving.forward.direct_call import DirectCall, LayerConstants
from vllm_buddy.serving.forward.pipeline import is_here

logger = init_logger(f"vllm.{__name__}")

# (positions, hidden_states, residual) -> (hidden_states, residual)
LayerFn = Callable[..., Any]
NormFn = Callable[[torch.Tensor, torch.Tensor], Any]

_SMALL = 0.01  # size of the states on which a bound layer is checked

# Between a compiled layer and the same layer uncompiled, relative to the norm of the output: they round differently.
_MOST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}


def layer_functions(
    layers: Sequence[nn.Module], vllm_config: VllmConfig, *, with_residual: bool = False
) -> list[LayerFn | None]:
    """Forward functions (positions, hidden_states, residual) -> (hidden_states, residual) of decoder layers.

    Compiled for any number of tokens where vLLM's mode says so (the default on CPU), else the layers themselves.

    layers: vLLM decoder layers that follow each other. Those that are not loaded have no function: None.
    with_residual: whether the first of them gets a residual, which the first of the model does not.
    """
    if not compiles(vllm_config):
        return [layer if is_here(layer) else None for layer in layers]
    functions: list[LayerFn | None] = []
    if not with_residual:
        functions.append(_compile_layer(layers[0], vllm_config, with_residual=False))
    pattern: tuple[nn.Module, DirectCall] | None = None
    for layer in layers[len(functions) :]:
        if not is_here(layer):
            functions.append(None)
            continue
        bound = None if pattern is None else _bind(*pattern, layer, vllm_config)
        if bound is not None:
            functions.append(bound)
            continue
        function = _compile_layer(layer, vllm_config, with_residual=True)
        pattern = (layer, function) if isinstance(function, DirectCall) else None
        functions.append(function)
    return functions


def norm_function(norm: nn.Module, vllm_config: VllmConfig) -> NormFn:
    """The model's last norm, (hidden_states, residual) -> (normed, their sum); compiled where layers are.

    norm: a vLLM RMSNorm. Uncompiled it is half a dozen small torch operations.
    """
    if not compiles(vllm_config):
        return norm.forward  # not the module: the model that keeps it would take it for one of its own
    compiled = compile_ahead(norm.forward, example_states(vllm_config, most_tokens(vllm_config)), vllm_config)
    return DirectCall.of(partial(compiled, norm), partial(example_states, vllm_config))


def compiles(vllm_config: VllmConfig) -> bool:
    """Whether layers are compiled one by one."""
    config = vllm_config.compilation_config
    # vLLM's CI setting (backend "eager") traces without a compiler: then the layers run as they are. With adapters a
    # layer reads which rows it has got (adapters.py), which no trace would see again.
    traced = config.mode == CompilationMode.DYNAMO_TRACE_ONCE and config.backend != "eager"
    return traced and vllm_config.lora_config is None


def _compile_layer(layer: Any, vllm_config: VllmConfig, *, with_residual: bool) -> LayerFn:
    example = partial(_layer_inputs, vllm_config, with_residual=with_residual)
    with _without_cache(layer, vllm_config):
        function = compile_ahead(layer.forward, example(most_tokens(vllm_config)), vllm_config)
        return DirectCall.of(partial(function, layer), example)


def _bind(pattern: nn.Module, call: DirectCall, layer: nn.Module, vllm_config: VllmConfig) -> DirectCall | None:
    """The direct call of `pattern`, bound to the weights of `layer`; None if the two layers are not alike.

    Checked against the layer itself: a constant of `pattern` that was compiled into the code would give another result.
    """
    bound, why = None, "another rank's layers differ"
    try:
        bound = call.bound_to(LayerConstants.of(pattern), LayerConstants.of(layer))
    except ValueError as error:
        why = str(error)
    if not _on_all_ranks(bound is not None) or bound is None:
        logger.warning_once("layers are compiled one by one, which takes seconds each: %s", why)
        return None
    positions, hidden, residual = _layer_inputs(vllm_config, 11, with_residual=True)
    # Small states: the layer normalises them, and what it adds is then all that is compared.
    hidden, residual = hidden * _SMALL, residual * _SMALL
    with _without_cache(layer, vllm_config):
        got = bound(positions, hidden.clone(), residual.clone())
        wanted = layer(positions, hidden.clone(), residual.clone())
    tolerance = _MOST_DIFFERENCE[vllm_config.model_config.dtype]
    alike = all((a - b).norm() <= tolerance * b.norm() for a, b in zip(got, wanted, strict=True))
    if _on_all_ranks(alike):
        return bound
    logger.warning_once("layers are compiled one by one, which takes seconds each: their code holds constants")
    return None


def _on_all_ranks(alike: bool) -> bool:
    """Whether all tensor-parallel ranks say so: a layer's all-reduces take all of them."""
    group = get_tp_group()
    if group.world_size == 1:
        return alike
    every = torch.tensor(int(alike))
    torch.distributed.all_reduce(every, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(every)


def _layer_inputs(vllm_config: VllmConfig, num_tokens: int, *, with_residual: bool) -> tuple[Any, ...]:
    hidden, residual = example_states(vllm_config, num_tokens)
    return torch.arange(num_tokens), hidden, residual if with_residual else None


@contextmanager
def _without_cache(layer: Any, vllm_config: VllmConfig) -> Iterator[None]:
    """Let a layer run while there is no KV cache; attention then returns a mixture of query, key and value."""
    # Without metadata attention neither writes to the cache nor reads it, but leaves its output uninitialised.
    with (
        override_forward_context(create_forward_context(None, vllm_config)),
        patch.object(layer.self_attn.attn.impl, "forward", _attend_to_itself),
    ):
        yield


def compile_ahead(
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


def _attend_to_itself(
    _layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, output: torch.Tensor, **__: Any
) -> torch.Tensor:
    """Stands in for the attention of one layer: each token sees itself alone, and its query and key.

    query, output: [num_tokens, num_heads, head_size]; key, value: [num_tokens, num_kv_heads, head_size].
    """
    group = query.shape[1] // key.shape[1]
    mixed = query + 2 * key.repeat_interleave(group, dim=1) + 3 * value.repeat_interleave(group, dim=1)
    return output.copy_(mixed.view_as(output))


def example_states(vllm_config: VllmConfig, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random hidden states and residual: each [num_tokens, hidden_size]."""
    model = vllm_config.model_config
    hidden, residual = torch.randn(2, num_tokens, model.get_hidden_size(), dtype=model.dtype).unbind()
    return hidden, residual


def most_tokens(vllm_config: VllmConfig) -> int:
    """The largest number of tokens in a step, at least two: a trace on one row would hold for one row only."""
    return max(2, vllm_config.scheduler_config.max_num_batched_tokens)
