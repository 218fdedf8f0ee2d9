"""LoRA: low-rank changes of the base weights, which the recipes `paper` and `distill` train.

The changes are merged into the weights before the model runs: W + (alpha / rank) B A.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from vllm_buddy.errors import ArtifactError


@dataclass(frozen=True)
class LoraDeltas:
    """The changes of a model's weights, by Hugging Face module name such as `model.layers.3.self_attn.q_proj`.

    a: module name -> [rank, in_features]. b: the same names -> [out_features, rank].
    """

    a: Mapping[str, torch.Tensor]
    b: Mapping[str, torch.Tensor]
    alpha: float

    @property
    def rank(self) -> int:
        return next(iter(self.a.values())).shape[0]

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return `weight` [out_features, in_features] of parameter `name` with its change, or itself without one.

        The sum is computed in float32 and rounded once to the weight's dtype.

        Raises:
            ArtifactError: the shapes of the weight and the change differ.
        """
        module = name.removesuffix(".weight")
        if module == name or module not in self.a:
            return weight
        a, b = (part[module].to(weight.device, torch.float32) for part in (self.a, self.b))
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise ArtifactError(
                f"the artifact's LoRA of {module} is for a weight of shape {[b.shape[0], a.shape[1]]}, "
                f"the model's has {list(weight.shape)}"
            )
        return torch.addmm(weight.float(), b, a, alpha=self.alpha / self.rank).to(weight.dtype)

    def merge_all(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the (name, weight) pairs of `weights` with their changes merged.

        Raises:
            ArtifactError: the shapes of a weight and its change differ, or, at the end, a weight to change is missing.
        """
        missing = set(self.a)
        for name, weight in weights:
            missing.discard(name.removesuffix(".weight"))
            yield name, self.merged(name, weight)
        if missing:
            raise _no_weight(min(missing))

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> None:
        """Merge the changes into the weights of a Hugging Face model in place.

        Raises:
            ArtifactError: the model lacks a weight, or its shape differs from that of the change.
        """
        parameters = dict(model.named_parameters())
        for module in self.a:
            name = f"{module}.weight"
            if name not in parameters:
                raise _no_weight(module)
            parameters[name].copy_(self.merged(name, parameters[name]))


def _no_weight(module: str) -> ArtifactError:
    return ArtifactError(f"the model has no weight of {module}, which the artifact's LoRA changes")
