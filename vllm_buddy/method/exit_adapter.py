"""The adapter of an exit: brings what a path of few layers says closer to what the whole model says.

    h + alpha W2 SiLU(W1 RMSNorm(h))

It stands between the last layer of the path and the model's own last norm and head (DEX, arXiv 2606.29223: the inducing
adapter). The norm has no weight, because W1 would absorb it. alpha is trained too, from a value at which the adapter
hardly does anything. After training W2 absorbs it, and the adapter has the form of a bypass.
"""

from dataclasses import dataclass

import torch
from torch import nn

from vllm_buddy.method.bypass import Bypass, bypass_delta
from vllm_buddy.method.path import LayerPath, gaps_of

START_ALPHA = 1e-3


@dataclass(frozen=True)
class ExitAdapter:
    """The served form: h + U SiLU(D RMSNorm(h)).

    down: [rank, hidden_size], D. up: [hidden_size, rank], U. eps: that of the model's RMSNorm.
    """

    down: torch.Tensor
    up: torch.Tensor
    eps: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def to(self, like: torch.Tensor) -> "ExitAdapter":
        """Return these weights in the dtype and on the device of `like`."""
        return ExitAdapter(self.down.to(like), self.up.to(like), self.eps)

    def rounded(self) -> "ExitAdapter":
        """Return these weights rounded to 8 bits as those of a bypass, float32: an artifact stores them exactly."""
        rounded = Bypass(self.down[None], self.up[None], self.eps).rounded()
        return ExitAdapter(rounded.down[0], rounded.up[0], self.eps)

    def delta(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what is added to `hidden`, the state after the last layer: [..., hidden_size]."""
        return bypass_delta(hidden, self.down, self.up, self.eps)

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the state before the model's last norm. hidden: [..., hidden_size], after the last layer."""
        return hidden + self.delta(hidden)


@dataclass(frozen=True)
class DraftExit:
    """Layers that draft, and the adapter of the state that they end in.

    bypass: of the path's gaps, each in the place of the gap's first layer; None: skipped layers have those that the
        artifact has for all paths.
    """

    path: LayerPath
    adapter: ExitAdapter
    bypass: Bypass | None = None

    def ranks(self, bypass_rank: int) -> int:
        """The sum of the ranks of adapter and bypasses. bypass_rank: of the artifact's bypass of each layer."""
        if self.bypass is not None:
            return self.adapter.rank + self.bypass.rank * len(gaps_of(self.path))
        return self.adapter.rank + bypass_rank * sum(map(len, gaps_of(self.path)))


class InducingAdapter(nn.Module):
    """The trained form.

    scale: the usual size of a state's elements, by which W2 is multiplied: learning rates then mean the same for models
        whose states are small and large.
    """

    def __init__(self, hidden_size: int, rank: int, eps: float, scale: float = 1.0) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(START_ALPHA))
        self.w1 = nn.Parameter(torch.randn(rank, hidden_size) / hidden_size**0.5)
        self.w2 = nn.Parameter(torch.randn(hidden_size, rank) / rank**0.5)
        self.eps, self.scale = eps, scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the state before the model's last norm. hidden: [..., hidden_size], float32."""
        return hidden + self.alpha * self.scale * bypass_delta(hidden, self.w1, self.w2, self.eps)

    @torch.no_grad()
    def folded(self) -> ExitAdapter:
        """Return the served form of these weights, float32 on the CPU."""
        up = self.alpha * self.scale * self.w2
        return ExitAdapter(self.w1.detach().cpu().clone(), up.cpu(), self.eps)
