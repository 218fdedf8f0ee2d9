"""Uses a model whose frozen weights are shared out among processes: each layer is gathered while it runs.

Gathering is collective: it ends when every process has asked for the same layer. The processes run different rows along
different paths, so what a process gathers must not depend on its rows. Each of them therefore gathers every layer, in
the order of the layers, whether a row runs it or not, and gathers again in the backward pass, in which a gradient
passes a frozen layer through its weights. While one layer runs, the next one is on its way.

Modules that are shared out have `unshard` and `reshard`, as torch's fully_shard makes them. On any other model the
functions here do nothing. `training/frozen_base.py` shares a model out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_ATTRIBUTE = "layer_shards"  # of the model


class LayerShards:
    """The decoder layers of a model that is shared out, in order.

    layers: each with `unshard(async_op)`, which gathers its weights, and `reshard()`, which gives them up.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._lowest = len(layers)  # whose output has a gradient, in the forward pass since the last backward pass
        self._end = 0  # lowest layer that any process needs in the backward pass

    def enter(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Gather layer `index`; in the backward pass, give it up. Returns `hidden`, its input."""
        return _Enter.apply(hidden, self, index)

    def leave(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Give up layer `index`; in the backward pass, gather it. Returns `hidden`, its output."""
        return _Leave.apply(hidden, self, index)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients of `loss`, and gather what only other processes need for theirs."""
        self._end = -_largest(-self._lowest, loss.device)
        loss.backward()
        if self._lowest < len(self._layers):
            self.release(self._lowest)  # where its input had no gradient, nothing has given it up
        for index in range(self._lowest - 1, self._end - 1, -1):
            self.gather_down(index)
            self.release(index)
        self._lowest = len(self._layers)

    def note_gradient(self, index: int) -> None:
        """Note that the output of layer `index` has a gradient."""
        self._lowest = min(self._lowest, index)

    def gather_up(self, index: int) -> None:
        """Gather layer `index`, and begin to gather the one after it."""
        self._gather(index, index + 1 if index + 1 < len(self._layers) else None)

    def gather_down(self, index: int) -> None:
        """Gather layer `index`, and begin to gather the one before it if a process will need it."""
        self._gather(index, index - 1 if index > self._end else None)

    def release(self, index: int) -> None:
        """Give up layer `index`."""
        self._layers[index].reshard()

    def _gather(self, index: int, ahead: int | None) -> None:
        self._layers[index].unshard(async_op=False)
        if ahead is not None:
            self._layers[ahead].unshard(async_op=True)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, shards: LayerShards, index: int) -> torch.Tensor:
        ctx.shards, ctx.index = shards, index
        shards.gather_up(index)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.shards.release(ctx.index)
        return gradient[0], None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, shards: LayerShards, index: int) -> torch.Tensor:
        ctx.shards, ctx.index = shards, index
        shards.release(index)
        if ctx.needs_input_grad[0]:
            shards.note_gradient(index)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.shards.gather_down(ctx.index)
        return gradient[0], None, None


def set_layer_shards(model: nn.Module, layers: Sequence[Any]) -> None:
    """Let the functions here know that the `layers` of `model` are shared out."""
    setattr(model, _ATTRIBUTE, LayerShards(layers))


def enter_layer(model: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
    """Have the weights of layer `index` at hand. All processes call it for all layers in turn.

    hidden: the input of the layer, which must be computed from what is returned.
    """
    shards = _shards(model)
    return hidden if shards is None else shards.enter(index, hidden)


def leave_layer(model: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
    """Give up the weights of layer `index`. hidden: the output of the layer; what is returned takes its place."""
    shards = _shards(model)
    return hidden if shards is None else shards.leave(index, hidden)


def is_split(module: nn.Module) -> bool:
    """Whether the weights of `module` are shared out among processes."""
    return hasattr(module, "unshard")


@contextmanager
def gathered(*modules: Any) -> Iterator[None]:
    """Have the weights of `modules` at hand inside this context, for what needs no backward pass through them.

    All processes enter it in the same order.
    """
    split = [module for module in modules if is_split(module)]
    for module in split:
        module.unshard()
    try:
        yield
    finally:
        for module in split:
            module.reshard()


def backward(model: nn.Module, loss: torch.Tensor) -> None:
    """Compute the gradients of `loss`, which follows from one pass over the layers on every process."""
    shards = _shards(model)
    if shards is None:
        loss.backward()
    else:
        shards.backward(loss)


def true_anywhere(model: nn.Module, here: bool) -> bool:
    """Whether `here` is true on any process, where all of them must do the same because they share the weights."""
    if _shards(model) is None:
        return here
    return bool(_largest(int(here), next(model.parameters()).device))


def from_main(model: nn.Module, value: float) -> float:
    """What the main process has computed, where all of them go on alike because they share the weights."""
    if _shards(model) is None:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=next(model.parameters()).device)
    torch.distributed.broadcast(shared, 0)
    return float(shared)


def _shards(model: nn.Module) -> LayerShards | None:
    return getattr(model, _ATTRIBUTE, None)


def _largest(value: int, device: torch.device) -> int:
    """The largest `value` of all processes."""
    shared = torch.tensor([value], device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return int(shared)
