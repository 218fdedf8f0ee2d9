"""The Decision Module, which scores the middle layers for a request: the trained form and the served form.

The trained form (BUDDY, section 3.2) is a two-layer MLP over the first layer's Value states,

    s = W_2 SiLU(W_1 [mean(V over all tokens so far) ; V of the newest token] + b_1) + b_2.

The first layer's V is a function of the token id alone, so W_1 V can be tabulated for the whole vocabulary. The served
("folded") form looks up token ids in these tables on the host and needs no forward pass.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.method.byte_grid import on_byte_grid
from vllm_buddy.method.context import Context
from vllm_buddy.method.sharded import gathered


class DecisionModule(nn.Module):
    """Computes one score per middle layer from pooled first-layer Value states.

    value_dim: num_kv_heads * head_dim of the base model.
    num_middle: number of layers to choose from, num_layers - 2.
    hidden: width r of the MLP; the paper's example is 32.
    """

    def __init__(self, value_dim: int, num_middle: int, hidden: int = 32) -> None:
        super().__init__()
        self.w1 = nn.Linear(2 * value_dim, hidden)
        self.w2 = nn.Linear(hidden, num_middle)

    def forward(self, mean_value: torch.Tensor, newest_value: torch.Tensor) -> torch.Tensor:
        """Return scores [..., num_middle]. mean_value, newest_value: [..., value_dim]."""
        hidden = self.w1(torch.cat([mean_value, newest_value], dim=-1))
        return self.w2(nn.functional.silu(hidden))


def value_table(model: nn.Module) -> torch.Tensor:
    """Return the first-layer Value states of every token id: [vocab_size, value_dim], float32.

    model: a Hugging Face Llama, Mistral, Qwen2 or Qwen3 causal language model.
    """
    backbone: Any = model.model
    first = backbone.layers[0]
    with torch.no_grad(), gathered(backbone.embed_tokens, first):
        normed = first.input_layernorm(backbone.embed_tokens.weight)
        return first.self_attn.v_proj(normed).float()


@dataclass(frozen=True)
class FoldedDecision:
    """The Decision Module as a function of token ids. All arrays are float32.

    table_context, table_newest: [vocab_size, r], rounded to 8 bits by `fold` (see byte_grid). b1: [r].
    w2: [num_middle, r]. b2: [num_middle].
    """

    table_context: np.ndarray
    table_newest: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray

    @classmethod
    def fold(cls, module: DecisionModule, values: torch.Tensor) -> "FoldedDecision":
        """Tabulate the first linear layer of `module` over `values` [vocab_size, value_dim] (see value_table).

        The tables are rounded to 8 bits here, so measurements after folding use the values that are stored and served.
        """
        with torch.no_grad():
            w_mean, w_newest = module.w1.weight.float().chunk(2, dim=1)
            return cls(
                table_context=on_byte_grid((values @ w_mean.T).numpy()),
                table_newest=on_byte_grid((values @ w_newest.T).numpy()),
                b1=module.w1.bias.float().numpy().copy(),
                w2=module.w2.weight.float().numpy().copy(),
                b2=module.w2.bias.float().numpy().copy(),
            )

    def scores(self, context: Context) -> np.ndarray:
        """Return the scores for the tokens that `context` has seen (at least one): [num_middle], float64."""
        half = context.mean
        half += self.table_newest[context.newest]
        half += self.b1
        half *= 0.5
        half += half * np.tanh(half)  # SiLU of 2 * half; exp(-hidden) could overflow
        return self._w2.dot(half) + self.b2

    @cached_property
    def _w2(self) -> np.ndarray:
        return self.w2.astype(np.float64)  # converted once, not in every product
