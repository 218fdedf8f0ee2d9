"""What a skipped layer leaves instead of itself: a small low-rank repair of the hidden state.

    h + U SiLU(D RMSNorm(h))

The norm has no weight of its own (it would be absorbed by D). The bypass acts on tokens that skip the layer and on no
others, so that at full depth the model is the base model, exactly, and the base weights stay untouched.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from vllm_buddy.method.byte_grid import on_byte_grid


@dataclass(frozen=True)
class Bypass:
    """Weights of the bypasses of all middle layers.

    down: [num_middle, rank, hidden_size]. up: [num_middle, hidden_size, rank]. eps: that of the model's RMSNorm.
    """

    down: torch.Tensor
    up: torch.Tensor
    eps: float

    @property
    def rank(self) -> int:
        return self.down.shape[1]

    def to(self, like: torch.Tensor) -> "Bypass":
        """In the dtype and on the device of `like`."""
        return Bypass(self.down.to(like), self.up.to(like), self.eps)

    def rounded(self) -> "Bypass":
        """On a grid of 8 bits, one scale per row of each matrix: what an artifact stores without loss. float32."""
        down, up = (
            torch.from_numpy(on_byte_grid(t.detach().cpu().float().flatten(0, 1).T.numpy()).T.copy()).view(t.shape)
            for t in (self.down, self.up)
        )
        return Bypass(down, up, self.eps)

    def apply(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [..., hidden_size] before `layer` (1 to num_layers - 2) -> what replaces that layer's output."""
        return hidden + bypass_delta(hidden, self.down[layer - 1], self.up[layer - 1], self.eps)


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def bypass_delta(
    hidden: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    eps: float,
    products: tuple[Product, Product] = (nn.functional.linear, nn.functional.linear),
) -> torch.Tensor:
    """What one bypass adds.

    hidden: [..., hidden_size]. down: [rank, hidden_size]; up: [hidden_size, rank]; or in the form that `products`, the
    functions that multiply by them, take.
    """
    by_down, by_up = products
    normed = nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=eps)
    return by_up(nn.functional.silu(by_down(normed, down)), up)
