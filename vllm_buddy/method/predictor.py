"""The Budget Predictor: from a prompt and a price of compute to a depth.

It expects, for each depth of its grid, how many nats a token loses beyond what it loses at the greatest of them, and
takes the depth that is cheapest when compute has a price:

    argmin over d of  excess_d(G) + price * d / num_layers .

BUDDY's predictor (section 3.4) is a categorical policy pi(k | G) for one fixed price. Here the price is an input, and
it enters the logits -(excess_d + price * d / L) / temperature linearly. The excess never falls with fewer layers. So,
whatever was learned, a higher price never takes a greater depth, price 0 takes the greatest one and a price beyond the
largest slope the smallest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vllm_buddy.method.context import Context
from vllm_buddy.method.decision import DecisionModule, FoldedDecision


class BudgetPredictor(nn.Module):
    """The predictor as it is trained, on the Decision Module's input and with its two layers.

    value_dim: see DecisionModule. depths: ascending, at least two. hidden: width r of the MLP.
    """

    def __init__(self, value_dim: int, depths: Sequence[int], num_layers: int, hidden: int = 16) -> None:
        super().__init__()
        self.depths = tuple(depths)
        self.module = DecisionModule(value_dim, len(self.depths) - 1, hidden)
        self.shares = torch.tensor(self.depths, dtype=torch.float32) / num_layers

    def excess(self, mean_value: torch.Tensor, newest_value: torch.Tensor) -> torch.Tensor:
        """mean_value, newest_value: [..., value_dim] -> nats above the greatest depth, [..., len(depths)]."""
        gaps = nn.functional.softplus(self.module(mean_value, newest_value))
        above = gaps.flip(-1).cumsum(-1).flip(-1)
        return nn.functional.pad(above, (0, 1))

    def log_policy(self, excess: torch.Tensor, price: torch.Tensor, temperature: float) -> torch.Tensor:
        """log pi(depth | context, price): [..., len(depths)]. excess: see there; price: [...], nats per model."""
        return (-(excess + price[..., None] * self.shares) / temperature).log_softmax(dim=-1)


@dataclass(frozen=True)
class FoldedPredictor:
    """The predictor as it is served, on token ids.

    decision: `w2` [len(depths) - 1, r] and `b2` give the steps of the excess between neighbouring depths, before
        softplus. depths: ascending; the grid. num_layers: of the base model.
    """

    decision: FoldedDecision
    depths: tuple[int, ...]
    num_layers: int

    @classmethod
    def fold(cls, predictor: BudgetPredictor, values: torch.Tensor, num_layers: int) -> "FoldedPredictor":
        """values: [vocab_size, value_dim], see decision.value_table."""
        return cls(FoldedDecision.fold(predictor.module, values), predictor.depths, num_layers)

    def excess(self, token_ids: Sequence[int]) -> np.ndarray:
        """Expected nats per token above the grid's greatest depth, [len(depths)], float64. token_ids: at least one."""
        context = Context(self.decision.table_context)
        context.extend(token_ids)
        above = np.logaddexp(0.0, self.decision.scores(context))[::-1].cumsum()[::-1]
        return np.append(above, 0.0)

    def depth(self, excess: np.ndarray, price: float, allowed: Sequence[int]) -> int:
        """The depth among `allowed` that costs least at `price`, nats per token for all layers of the model.

        excess: see there. allowed: depths of the grid. Of depths that cost the same the greatest.
        """
        by_depth = dict(zip(self.depths, excess.tolist()))
        # The share first: the largest finite price must not overflow.
        return min(allowed, key=lambda d: (by_depth[d] + price * (d / self.num_layers), -d))
