"""Hidden states between layers, which some drafters take beside the last ones (EAGLE-3, arXiv 2503.01840)."""

from collections.abc import Collection
from typing import TypeAlias

import torch
from vllm.sequence import IntermediateTensors

# Hidden states after the last norm, beside them the auxiliary ones where a drafter asks for them, or what the next
# pipeline stage gets.
ModelOutput: TypeAlias = torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]] | IntermediateTensors


class AuxiliaryStates:
    """Collects the states before certain layers while a forward pass runs, as vLLM's EagleModelMixin does.

    layers: their indices; the number of layers stands for the state after the last one. A row that skips layers has
    there what passed: the state that its own next layer gets.
    """

    def __init__(self, layers: Collection[int] = ()) -> None:
        self.layers = frozenset(layers)
        self._states: list[torch.Tensor] = []

    def pass_by(self, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Keep the state before a layer, if it is one of `layers`. hidden, residual: [num_tokens, hidden_size]."""
        if layer in self.layers:
            # Of its own: layers may overwrite what they get.
            self._states.append(hidden.clone() if residual is None else hidden + residual)

    def beside(self, hidden: torch.Tensor) -> ModelOutput:
        """What vLLM's runner expects of a model: with states that were asked for, a pair."""
        return (hidden, self._states) if self.layers else hidden
