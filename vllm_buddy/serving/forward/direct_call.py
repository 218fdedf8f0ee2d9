"""A compiled layer without torch's wrappers around it."""

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor.output_code import CompiledFxGraph
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


class DirectCall:
    """Calls the generated code of a compiled layer directly.

    Between a compiled function and its generated code lie wrappers that flatten arguments and handle gradients and
    aliased outputs. They take tens of microseconds a call, and a layer, unlike a whole model, is called 30 times a
    step. Here the flat arguments of one recorded call are kept as a template; only the inputs change.
    """

    def __init__(self, code: Callable[[list[Any]], Any], template: list[Any], inputs: list[int], sizes: list[int]):
        self._code = code
        self._template = template
        self._inputs = inputs  # where the arguments that are tensors stand in the template
        self._sizes = sizes  # where the number of tokens stands
        self.outputs: tuple[int, int] = (0, 1)  # where hidden and residual stand in what the code returns

    def __call__(self, *arguments: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        flat = self._template.copy()
        for place, tensor in zip(self._inputs, arguments):
            flat[place] = tensor
        num_tokens = arguments[0].shape[0]  # type: ignore[union-attr]
        for place in self._sizes:
            flat[place] = num_tokens
        result = self._code(flat)
        return result[self.outputs[0]], result[self.outputs[1]]

    @classmethod
    def of(cls, function: Callable[..., Any], example: Callable[[int], tuple[Any, ...]]) -> Callable[..., Any]:
        """The direct call of a compiled layer, checked against it to the last bit on inputs of another size.

        example: from a number of tokens to random inputs; an input that is None is the last.
        Falls back to `function`, with a warning, if a version of torch generates code of another form.
        """
        try:
            direct = cls._record(function, example(37))
            check = example(11)
            same = all(torch.equal(a, b) for a, b in zip(direct(*check), function(*check), strict=True))
        except (ValueError, AttributeError, TypeError, IndexError) as error:
            logger.warning_once("compiled layers are called through torch's wrappers, which is slower: %s", error)
            return function
        if not same:
            raise RuntimeError("the generated code of a layer, called directly, does not give what the layer gives")
        return direct

    @classmethod
    def _record(cls, function: Callable[..., Any], example: tuple[Any, ...]) -> "DirectCall":
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
