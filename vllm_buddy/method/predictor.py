"""The Budget Predictor: chooses the depth of a request from its prompt and a price of compute.

The predictor has a grid of depths. For each one it estimates the excess: the additional loss per token, in nats,
compared to the greatest depth of the grid. It chooses the depth with the lowest total cost:

    argmin over d of  excess_d(G) + price * d / num_layers .

BUDDY's predictor (section 3.4) is a categorical policy pi(k | G) for one fixed price. Here the price is an input that
enters the logits -(excess_d + price * d / L) / temperature linearly. By construction, the excess never decreases as
layers are removed. Whatever the training result, a higher price therefore never chooses a greater depth, price 0
chooses the greatest depth, and a price above the largest slope chooses the smallest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vllm_buddy.method.context import Context
from vllm_buddy.method.decision import DecisionModule, FoldedDecision


class BudgetPredictor(nn.Module):
    """The trained form of the predictor. Its input and its two layers are those of the Decision Module.

    value_dim: see DecisionModule. depths: the grid, ascending, at least two. hidden: width r of the MLP.
    """

    def __init__(self, value_dim: int, depths: Sequence[int], num_layers: int, hidden: int = 16) -> None:
        super().__init__()
        self.depths = tuple(depths)
        self.module = DecisionModule(value_dim, len(self.depths) - 1, hidden)
        self.shares = torch.tensor(self.depths, dtype=torch.float32) / num_layers

    def excess(self, mean_value: torch.Tensor, newest_value: torch.Tensor) -> torch.Tensor:
        """Return the excess of each depth in nats: [..., len(depths)]. mean_value, newest_value: [..., value_dim]."""
        gaps = nn.functional.softplus(self.module(mean_value, newest_value))
        above = gaps.flip(-1).cumsum(-1).flip(-1)
        return nn.functional.pad(above, (0, 1))

    def log_policy(self, excess: torch.Tensor, price: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return log pi(depth | context, price): [..., len(depths)].

        excess: result of `excess`. price: [...], nats per token for all layers of the model.
        """
        return (-(excess + price[..., None] * self.shares) / temperature).log_softmax(dim=-1)


@dataclass(frozen=True)
class FoldedPredictor:
    """The served form of the predictor, a function of token ids.

    decision: its outputs (`w2` is [len(depths) - 1, r]) are the differences in excess between neighbouring depths,
        before softplus.
    depths: the grid, ascending. num_layers: layers of the base model.
    """

    decision: FoldedDecision
    depths: tuple[int, ...]
    num_layers: int

    @classmethod
    def fold(cls, predictor: BudgetPredictor, values: torch.Tensor, num_layers: int) -> "FoldedPredictor":
        """Tabulate `predictor` over `values`: [vocab_size, value_dim], see decision.value_table."""
        return cls(FoldedDecision.fold(predictor.module, values), predictor.depths, num_layers)

    def excess(self, token_ids: Sequence[int]) -> np.ndarray:
        """Estimate the excess of each depth in nats per token: [len(depths)], float64. token_ids: at least one."""
        context = Context(self.decision.table_context)
        context.extend(token_ids)
        above = np.logaddexp(0.0, self.decision.scores(context))[::-1].cumsum()[::-1]
        return np.append(above, 0.0)

    def depth(self, excess: np.ndarray, price: float, allowed: Sequence[int]) -> int:
        """Return the depth among `allowed` with the lowest total cost; the greatest one if several are equal.

        excess: result of `excess`. price: nats per token for all layers of the model. allowed: depths of the grid.
        """
        by_depth = dict(zip(self.depths, excess.tolist()))
        # d / num_layers is computed first, so that the largest finite price does not overflow.
        return min(allowed, key=lambda d: (by_depth[d] + price * (d / self.num_layers), -d))
