"""vLLM's compilation, one decoder layer at a time.

vLLM compiles the whole model as one graph, which fixes the list of layers. A graph per layer serves every path and
batch size. The graphs of the layers are alike, so the compiler's caches make all but the first two cheap.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._inductor.output_code import CompiledFxGraph
from vllm.config import CompilationMode, VllmConfig
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

LayerFn = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def layer_functions(layers: Sequence[nn.Module], first_layer: int, vllm_config: VllmConfig) -> list[LayerFn]:
    """Forward functions (positions, hidden_states, residual) -> (hidden_states, residual) of decoder layers.

    Compiled for any number of tokens where vLLM's mode says so (the default on CPU), else the layers themselves.

    layers: vLLM decoder layers. first_layer: index of layers[0] in the model; layer 0 gets no residual.
    """
    config = vllm_config.compilation_config
    # vLLM's CI setting asks for tracing without a compiler behind it, which is the layer itself.
    if config.mode != CompilationMode.DYNAMO_TRACE_ONCE or config.backend == "eager":
        return list(layers)
    return [
        _compile(layer, vllm_config, with_residual=index > 0) for index, layer in enumerate(layers, start=first_layer)
    ]


def _compile(layer: Any, vllm_config: VllmConfig, *, with_residual: bool) -> LayerFn:
    """Compile one layer ahead of its first use, as vLLM compiles a model: one trace, no guards."""
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    options |= vllm_config.compilation_config.inductor_compile_config
    backend = vllm_config.compilation_config.init_backend(vllm_config)
    # Without metadata attention neither writes to the cache nor reads it.
    no_attention = create_forward_context(None, vllm_config)
    largest = max(2, vllm_config.scheduler_config.max_num_batched_tokens)
    example = _example(vllm_config, with_residual=with_residual, num_tokens=largest)
    for tensor in example:
        if tensor is not None:
            torch._dynamo.mark_dynamic(tensor, 0)
    with torch._dynamo.config.patch(enable_aot_compile=True), override_forward_context(no_attention):
        compiled: Any = torch.compile(layer.forward, fullgraph=True, dynamic=False, backend=backend, options=options)
        function = compiled.aot_compile((example, {}))
        function.disable_guard_check()
        with patch.object(layer.self_attn.attn.impl, "forward", _attend_to_itself):
            return DirectCall.of(partial(function, layer), vllm_config, with_residual=with_residual)


def _attend_to_itself(layer: Any, query: torch.Tensor, *args: Any, output: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Stands in for attention while there is no cache: without metadata the output would be left uninitialised."""
    return output.copy_(query)


class DirectCall:
    """Calls the generated code of a compiled layer directly.

    Between a compiled function and its generated code lie wrappers that flatten arguments and handle gradients and
    aliased outputs. They take tens of microseconds a call, and a layer, unlike a whole model, is called 30 times a
    step. Here the flat arguments of one recorded call are kept as a template; only the inputs change.
    """

    def __init__(self, code: Callable[[list[Any]], Any], template: list[Any], inputs: list[int], sizes: list[int]):
        self._code = code
        self._template = template
        self._inputs = inputs  # where positions, hidden and residual stand in the template
        self._sizes = sizes  # where the number of tokens stands
        self.outputs: tuple[int, int] = (0, 1)  # where hidden and residual stand in what the code returns

    def __call__(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        flat = self._template.copy()
        for place, tensor in zip(self._inputs, (positions, hidden, residual)):
            flat[place] = tensor
        for place in self._sizes:
            flat[place] = hidden.shape[0]
        result = self._code(flat)
        return result[self.outputs[0]], result[self.outputs[1]]

    @classmethod
    def of(cls, function: LayerFn, vllm_config: VllmConfig, *, with_residual: bool) -> LayerFn:
        """The direct call of a compiled layer, checked against it to the last bit on inputs of another size.

        Falls back to `function`, with a warning, if a version of torch generates code of another form.
        """
        try:
            direct = cls._record(function, _example(vllm_config, with_residual=with_residual, num_tokens=37))
            check = _example(vllm_config, with_residual=with_residual, num_tokens=11)
            same = all(torch.equal(a, b) for a, b in zip(direct(*check), function(*check), strict=True))
        except (ValueError, AttributeError, TypeError, IndexError) as error:
            logger.warning_once("compiled layers are called through torch's wrappers, which is slower: %s", error)
            return function
        if not same:
            raise RuntimeError("the generated code of a layer, called directly, does not give what the layer gives")
        return direct

    @classmethod
    def _record(cls, function: LayerFn, example: tuple[Any, ...]) -> "DirectCall":
        calls: list[tuple[Any, list[Any], Any]] = []
        run = CompiledFxGraph.__call__

        def record(graph: CompiledFxGraph, inputs: Any) -> Any:
            flat = list(inputs)  # the generated code clears the list that it is given
            calls.append((graph, flat, run(graph, inputs)))
            return calls[-1][2]

        with patch.object(CompiledFxGraph, "__call__", record):
            expected = function(*example)
        (graph, flat, result), *others = calls
        if others:
            raise ValueError("a layer was compiled to more than one graph")
        inputs = [_place(flat, tensor) for tensor in example if tensor is not None]
        sizes = [i for i, value in enumerate(flat) if isinstance(value, int) and value == len(example[0])]
        template = [None if i in inputs else value for i, value in enumerate(flat)]
        direct = cls(graph.current_callable, template, inputs, sizes)
        direct.outputs = (_place(result, expected[0]), _place(result, expected[1]))
        return direct


def _place(values: Sequence[Any], tensor: torch.Tensor) -> int:
    """Index of the one entry of `values` that is `tensor` or shares its memory."""
    places = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor) and v.data_ptr() == tensor.data_ptr()]
    if len(places) != 1:
        raise ValueError(f"an input or output of a layer stands in {len(places)} places of its generated code")
    return places[0]


def _example(vllm_config: VllmConfig, *, with_residual: bool, num_tokens: int) -> tuple[Any, ...]:
    """Random inputs of a layer."""
    model = vllm_config.model_config
    positions = torch.arange(num_tokens)
    hidden, residual = torch.randn(2, num_tokens, model.get_hidden_size(), dtype=model.dtype).unbind()
    return positions, hidden, residual if with_residual else None
