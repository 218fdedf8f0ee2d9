"""Calling generated code directly: where it cannot be had, and where it would be wrong."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor.output_code import CompiledFxGraph

from vllm_buddy.serving.forward import direct_call
from vllm_buddy.serving.forward.direct_call import DirectCall, LayerConstants


def example(num_tokens: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(num_tokens, 4),)


def compiled(code: Callable[[list[Any]], Any], seen: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """A function as torch compiles one. code: what was generated for it. seen: what its wrappers make of the input."""
    graph = SimpleNamespace(current_callable=code)

    def call(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # As torch's wrappers do, by the class: that is where calls are recorded.
        return CompiledFxGraph.__call__(graph, [len(rows), seen(rows)])  # type: ignore[arg-type]

    return call


@pytest.fixture(autouse=True)
def plain_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompiledFxGraph, "__call__", lambda graph, inputs: graph.current_callable(list(inputs)))


def same(rows: torch.Tensor) -> torch.Tensor:
    return rows


def test_generated_code_is_called_with_the_inputs_and_their_number() -> None:
    """Fails if the other tests here pass for another reason."""
    call = DirectCall.of(compiled(lambda flat: (flat[0] * flat[1],), same), example)
    assert isinstance(call, DirectCall)
    (got,) = call(torch.ones(3, 4))
    assert torch.equal(got, torch.full((3, 4), 3.0))


def test_code_of_another_form_is_called_through_torch(caplog: pytest.LogCaptureFixture) -> None:
    """Fails if a torch that passes copies of the inputs to the code ends the server, or nobody is told."""
    direct_call.logger.addHandler(caplog.handler)
    function = compiled(lambda flat: (flat[1] + 1,), torch.clone)
    with caplog.at_level(logging.WARNING):
        assert DirectCall.of(function, example) is function
    direct_call.logger.removeHandler(caplog.handler)
    assert "called through torch's wrappers, which is slower" in caplog.text


def test_code_that_gives_something_else_is_not_used() -> None:
    """Fails if a server computes wrong tokens with code that holds what belongs to one call."""
    sizes: list[int] = []

    def remembers(flat: list[Any]) -> tuple[torch.Tensor]:
        sizes.append(flat[0])
        return (flat[1] + len(sizes),)

    with pytest.raises(RuntimeError, match="does not give what the layer gives"):
        DirectCall.of(compiled(remembers, same), example)


def test_code_that_knows_its_layer_is_bound_to_no_other() -> None:
    """Fails if attention of all layers finds the KV cache of the first (VLLM_USE_LAYERNAME=0)."""
    weight, other = torch.ones(2), torch.zeros(2)
    call = DirectCall(lambda flat: (flat[1],), [None, weight], [0], [], (0,))
    with pytest.raises(ValueError, match="VLLM_USE_LAYERNAME=0"):
        call.bound_to(LayerConstants({"w": weight}, {}), LayerConstants({"w": other}, {}))


def test_a_layers_own_number_is_no_constant_of_its_code() -> None:
    """Fails if layers of Mistral, which know their number, are compiled one by one."""
    layers = [torch.nn.Linear(2, 2) for _ in range(2)]
    for number, layer in enumerate(layers):
        layer.layer_idx = number  # type: ignore[assignment]
        layer.eps = 1e-5  # type: ignore[assignment]
    scalars = [LayerConstants.of(layer).scalars for layer in layers]
    assert scalars[0] == scalars[1]
    assert scalars[0][".eps"] == 1e-5
