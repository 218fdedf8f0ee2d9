"""Calls the generated code of a compiled layer directly, and binds it to the weights of layers that are alike.

A compiled function passes through wrappers of torch that flatten arguments and handle gradients and aliased outputs:
tens of microseconds a call, 30 times a step for a model of 30 layers. And torch compiles each layer again, for seconds,
although the generated code takes all that differs between layers as arguments. A DirectCall keeps the flat arguments of
one recorded call as a template. Per call only the inputs change; for another layer only the weights do.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._inductor.output_code import CompiledFxGraph
from vllm.logger import init_logger
from vllm.utils.torch_utils import LayerName

logger = init_logger(f"vllm.{__name__}")

# Attributes of attributes of a module in which a tensor may be kept: `scheme.kernel.dnnl_handler.handler_tensor`.
_DEEPEST = 4

# Numbers that differ between layers and are in no code: a layer's own number, and what attention keeps, whose op finds
# it by the layer's name.
_NOT_COMPILED = re.compile(r"(^|\.)layer_idx$|(^|\.)attn\.")


class DirectCall:
    """The generated code of a compiled function with its arguments.

    template: flat arguments of the code. inputs: the places of the function's tensor arguments in it. sizes: the places
    of the number of tokens. outputs: the places of the function's results in what the code returns.
    """

    def __init__(
        self,
        code: Callable[[list[Any]], Any],
        template: list[Any],
        inputs: list[int],
        sizes: list[int],
        outputs: tuple[int, ...],
    ) -> None:
        self._code = code
        self._template = template
        self._inputs = inputs
        self._sizes = sizes
        self._outputs = outputs

    def __call__(self, *arguments: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        flat = self._template.copy()
        for place, tensor in zip(self._inputs, arguments):
            flat[place] = tensor
        num_tokens = arguments[0].shape[0]  # type: ignore[union-attr]
        for place in self._sizes:
            flat[place] = num_tokens
        result = self._code(flat)
        return tuple([result[place] for place in self._outputs])

    def bound_to(self, own: "LayerConstants", others: "LayerConstants") -> "DirectCall":
        """The same code on another layer's arguments.

        own, others: the constants of the layer that was compiled and of the other one.

        Raises:
            ValueError: the other layer differs in something that the code was generated for.
        """
        if different := sorted(name for name, value in own.scalars.items() if others.scalars.get(name) != value):
            raise ValueError(f"{different[0]} is {others.scalars.get(different[0])}, not {own.scalars[different[0]]}")
        names = {_identity(value): name for name, value in own.arguments.items()}
        template = list(self._template)
        for place, value in enumerate(template):
            if value is None or isinstance(value, int):  # an input, or a size
                continue
            if not isinstance(value, (torch.Tensor, LayerName)):
                raise ValueError(f"the code takes a {type(value).__name__}, which is none of its weights")
            name = names.get(_identity(value), "")
            other = others.arguments.get(name)
            if other is None or _form(other) != _form(value):
                raise ValueError(f"the argument {name or _form(value)} has no counterpart of the same form")
            template[place] = other
        if not any(isinstance(value, LayerName) for value in template):
            # Attention would find the layer that was compiled, and its KV cache.
            raise ValueError("the layer's name is compiled into its code (VLLM_USE_LAYERNAME=0)")
        return DirectCall(self._code, template, self._inputs, self._sizes, self._outputs)

    @classmethod
    def of(cls, function: Callable[..., Any], example: Callable[[int], tuple[Any, ...]]) -> Callable[..., Any]:
        """The direct call of a compiled function, checked against it to the last bit on inputs of another size.

        example: from a number of tokens to random inputs; only the last of them may be None.
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
        outputs = tuple(_place(result, tensor) for tensor in expected)
        return cls(graph.current_callable, template, inputs, sizes, outputs)


@dataclass(frozen=True)
class LayerConstants:
    """What tells one layer from another, by where the layer keeps it.

    arguments: what its generated code takes as arguments: parameters and buffers, tensors in attributes or in closures
        of its modules (vLLM packs weights on CPU and keeps the handle there), and the names by which vLLM's attention
        op finds its layer. scalars: numbers in the same places, which are compiled into the code.
    """

    arguments: dict[str, Any]
    scalars: dict[str, float]

    @classmethod
    def of(cls, layer: nn.Module) -> "LayerConstants":
        """The constants of a vLLM decoder layer."""
        arguments: dict[str, Any] = {}
        scalars: dict[str, float] = {}
        for name, module in layer.named_modules():
            for path, value in _reachable(module, name, _DEEPEST):
                if isinstance(value, torch.Tensor):
                    arguments.setdefault(path, value)
                elif not _NOT_COMPILED.search(path):
                    scalars.setdefault(path, value)
            if isinstance(layer_name := getattr(module, "layer_name", None), str):
                arguments[f"{name}.layer_name"] = LayerName(layer_name)
        return cls(arguments, scalars)


def _reachable(owner: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Tensors and numbers in an object's attributes and in closures, but not in submodules."""
    if isinstance(owner, (torch.Tensor, int, float)):
        yield path, owner
        return
    if depth == 0:
        return
    if isinstance(owner, FunctionType):
        variables = owner.__code__.co_freevars
        children = {name: _content(cell) for name, cell in zip(variables, owner.__closure__ or ())}
    elif isinstance(owner, dict):
        children = {str(name): value for name, value in owner.items()}
    elif hasattr(owner, "__dict__"):
        children = dict(vars(owner))
        children.pop("_modules", None)
    else:
        return
    for name, child in children.items():
        if not isinstance(child, (nn.Module, type)):
            yield from _reachable(child, f"{path}.{name}", depth - 1)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _identity(value: Any) -> Any:
    """What tells an argument of generated code apart: memory and form of a tensor, the value of anything else."""
    return (value.data_ptr(), *_form(value)) if isinstance(value, torch.Tensor) else value


def _form(value: Any) -> Any:
    """What the code was generated for: shape, strides and dtype of a tensor, the type of anything else."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return type(value)


def _place(values: Sequence[Any], tensor: torch.Tensor) -> int:
    """Index of the one entry of `values` that is `tensor` or shares its memory."""
    places = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor) and v.data_ptr() == tensor.data_ptr()]
    if len(places) != 1:
        raise ValueError(f"an input or output of a layer stands in {len(places)} places of its generated code")
    return places[0]
