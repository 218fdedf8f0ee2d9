"""The bypass: a small low-rank network that repairs the hidden state of tokens that skip a layer.

    h + U SiLU(D RMSNorm(h))

The norm has no weight, because D would absorb it. A bypass acts only on tokens that skip its layer. At full depth the
model therefore equals the base model exactly, and the base weights stay untouched.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from vllm_buddy.method.byte_grid import on_byte_grid


@dataclass(frozen=True)
class Bypass:
    """The weights of bypasses, those of all middle layers or of some layers.

    down: [num_bypasses, rank, hidden_size], D. up: [num_bypasses, hidden_size, rank], U. eps: that of the model's
    RMSNorm. layers: those that have one, ascending; skipping another one changes nothing. None: all middle layers do.
    """

    down: torch.Tensor
    up: torch.Tensor
    eps: float
    layers: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[1]

    def to(self, like: torch.Tensor) -> "Bypass":
        """Return these weights in the dtype and on the device of `like`."""
        return replace(self, down=self.down.to(like), up=self.up.to(like))

    def rounded(self) -> "Bypass":
        """Return these weights rounded to 8 bits with one scale per row, float32: an artifact stores them exactly."""
        down, up = (
            torch.from_numpy(on_byte_grid(t.detach().cpu().float().flatten(0, 1).T.numpy()).T.copy()).view(t.shape)
            for t in (self.down, self.up)
        )
        return replace(self, down=down, up=up)

    def apply(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Replace the output of `layer` (1 to num_layers - 2). hidden: the layer's input, [..., hidden_size]."""
        if self.layers is None:
            index = layer - 1
        elif layer in self.layers:
            index = self.layers.index(layer)
        else:
            return hidden
        return hidden + bypass_delta(hidden, self.down[index], self.up[index], self.eps)


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def bypass_delta(
    hidden: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    eps: float,
    products: tuple[Product, Product] = (nn.functional.linear, nn.functional.linear),
) -> torch.Tensor:
    """Return what one bypass adds to `hidden`: [..., hidden_size].

    down: [rank, hidden_size]; up: [hidden_size, rank]. products: the functions that multiply by `down` and by `up`;
    the weights may have any form that these functions take.
    """
    by_down, by_up = products
    normed = nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=eps)
    return by_up(nn.functional.silu(by_down(normed, down)), up)
