"""The trainable repair of a routed model: a bypass for each skipped layer, or LoRA on all layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from vllm_buddy.errors import TrainingError
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.lora import LoraDeltas


class Repair(Protocol):
    """The change of the model that a recipe trains."""

    exact_at_full_depth: bool  # if so, sequences at full depth are of no use in training

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters, float32."""
        ...

    def bypass(self) -> Bypass | None:
        """Return the current bypass, with gradients."""
        ...

    def deltas(self) -> LoraDeltas | None:
        """Return the current change of the base weights, without gradients."""
        ...


class BypassRepair:
    """A low-rank bypass for each middle layer. The base model is not changed.

    Each matrix is a parameter of its own, because Muon works on matrices.
    """

    exact_at_full_depth = True

    def __init__(self, start: Bypass) -> None:
        self._down, self._up = ([nn.Parameter(part.clone()) for part in parts] for parts in (start.down, start.up))
        self._eps = start.eps

    def parameters(self) -> list[nn.Parameter]:
        return [*self._down, *self._up]

    def bypass(self) -> Bypass:
        return Bypass(torch.stack([*self._down]), torch.stack([*self._up]), self._eps)

    def deltas(self) -> None:
        return None


class LoraRepair:
    """LoRA on every linear layer of the decoder, by peft. It is merged into the weights when the artifact is served.

    model: changed in place; peft replaces its linear layers.

    Raises:
        TrainingError: peft is not installed.
    """

    exact_at_full_depth = False

    def __init__(self, model: nn.Module, rank: int, alpha: float) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise TrainingError("LoRA needs peft: pip install peft") from None
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear")
        inject_adapter_in_model(config, model)
        self._alpha = alpha
        self._modules: dict[str, Any] = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    def parameters(self) -> list[nn.Parameter]:
        return [m[side] for m in self._sides() for side in ("a", "b")]

    def bypass(self) -> None:
        return None

    def deltas(self) -> LoraDeltas:
        a = {name: m["a"].detach().clone() for name, m in zip(self._modules, self._sides())}
        b = {name: m["b"].detach().clone() for name, m in zip(self._modules, self._sides())}
        return LoraDeltas(a, b, self._alpha)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch LoRA off inside this context, so that the model is the base model."""
        for module in self._modules.values():
            module.enable_adapters(False)
        try:
            yield
        finally:
            for module in self._modules.values():
                module.enable_adapters(True)

    def _sides(self) -> list[dict[str, nn.Parameter]]:
        return [{"a": m.lora_A["default"].weight, "b": m.lora_B["default"].weight} for m in self._modules.values()]
