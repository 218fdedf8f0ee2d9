"""Trains the Budget Predictor of stage 2 by GRPO, on losses that are measured once for every depth.

All other weights are frozen, so the reward of a depth on an example never changes. Groups are drawn from the table of
measured losses, and one step costs a product of small matrices. With the entropy bonus at `temperature` nats the best
policy over depths d, given a context G, is

    pi(d | G, price)  ~  exp(-(E[loss of d | G] + price d / L) / temperature).

The policy has this form: it learns the expected loss, and all prices share the same weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.method.predictor import BudgetPredictor
from vllm_buddy.training.grpo import entropy, group_advantages, grpo_loss
from vllm_buddy.training.stage2_settings import Stage2Settings

LOG_EVERY = 10  # steps between two log rows, each with an evaluation of the held-out samples
SMALLEST_STEP = 1e-3  # nats between the losses of neighbouring depths at the start, at least
PRICES = 33  # from 0 to max_price, at which held-out samples are evaluated


@dataclass(frozen=True)
class Contexts:
    """The predictor's input for each sample. means, newest: [num_samples, value_dim], float32 (see DecisionModule)."""

    means: torch.Tensor
    newest: torch.Tensor

    def at(self, rows: torch.Tensor) -> "Contexts":
        return Contexts(self.means[rows], self.newest[rows])


def fit_predictor(
    contexts: Contexts,
    losses: np.ndarray,
    depths: tuple[int, ...],
    num_layers: int,
    settings: Stage2Settings,
    report: Callable[[dict[str, Any]], None],
) -> tuple[BudgetPredictor, torch.Tensor]:
    """Train a predictor on a part of the samples and keep the weights that do best on the rest.

    losses: [num_samples, len(depths)], nats per token. report: called with a log row every LOG_EVERY steps.

    Returns:
        the predictor; the indices of the held-out samples.
    """
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    shuffled = torch.from_numpy(rng.permutation(len(losses)))
    held_out, fitted = shuffled.tensor_split([int(len(losses) * settings.held_out)])
    table = torch.from_numpy(losses).float()
    scale = Standardised.of(contexts.at(fitted))
    inputs = scale(contexts)
    predictor = BudgetPredictor(contexts.means.shape[1], depths, num_layers, settings.hidden)
    _start_constant(predictor, table[fitted])
    prices = torch.linspace(0, settings.max_price, PRICES)
    optimizer = torch.optim.AdamW(predictor.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    best, kept = math.inf, predictor.state_dict()
    for step in range(settings.steps + 1):
        if step % LOG_EVERY == 0 or step == settings.steps:
            row = {"step": step, **_look(predictor, inputs.at(held_out), table[held_out], prices, settings.temperature)}
            report(row)
            if row["held_out"] < best:
                best, kept = row["held_out"], {name: value.clone() for name, value in predictor.state_dict().items()}
        if step < settings.steps:
            rows = fitted[torch.from_numpy(rng.integers(len(fitted), size=settings.batch))]
            price = torch.from_numpy(rng.uniform(0, settings.max_price, settings.batch)).float()
            optimizer.zero_grad()
            _loss(predictor, inputs.at(rows), table[rows], price, settings).backward()
            optimizer.step()
    predictor.load_state_dict(kept)
    scale.absorb(predictor)
    return predictor, held_out


def _loss(
    predictor: BudgetPredictor, inputs: Contexts, losses: torch.Tensor, price: torch.Tensor, settings: Stage2Settings
) -> torch.Tensor:
    """Return the loss of one step. losses: [batch, num_depths]; price: [batch]."""
    log_pi = predictor.log_policy(predictor.excess(inputs.means, inputs.newest), price, settings.temperature)
    rewards = -(losses + price[:, None] * predictor.shares)
    if settings.group:
        actions = log_pi.detach().exp().multinomial(settings.group, replacement=True)
        drawn = log_pi.gather(1, actions)
        advantages, spread = group_advantages(rewards.gather(1, actions))
        policy_loss = grpo_loss(drawn, drawn, advantages)
    else:
        advantages, spread = group_advantages(rewards)
        policy_loss = grpo_loss(log_pi, torch.full_like(log_pi, -math.log(log_pi.shape[1])), advantages)
    return policy_loss - settings.temperature / spread * entropy(log_pi).mean()


@torch.no_grad()
def _look(
    predictor: BudgetPredictor, inputs: Contexts, losses: torch.Tensor, prices: torch.Tensor, temperature: float
) -> dict[str, float]:
    """Return figures of the held-out samples, averaged over prices: cost, entropy, and the mean and spread of budgets.

    The cost is the loss plus price times budget. losses: [num_samples, num_depths]; prices: [num_prices].
    """
    excess = predictor.excess(inputs.means, inputs.newest)
    log_pi = predictor.log_policy(excess[:, None], prices.expand(len(excess), -1), temperature)
    costs = losses[:, None] + prices[:, None] * predictor.shares
    chosen = log_pi.argmax(dim=-1, keepdim=True)
    return {
        "held_out": float(costs.gather(-1, chosen).mean()),
        "entropy": float(entropy(log_pi).mean()),
        "budget": float(predictor.shares[chosen].mean()),
        "budget_stdev": float(predictor.shares[chosen[..., 0]].std(dim=0).mean()),
    }


def _start_constant(predictor: BudgetPredictor, losses: torch.Tensor) -> None:
    """Start from the mean losses for every context: the best policy that ignores the context."""
    mean = losses.mean(dim=0)
    nn.init.zeros_(predictor.module.w2.weight)
    with torch.no_grad():
        predictor.module.w2.bias.copy_((mean[:-1] - mean[1:]).clamp_min(SMALLEST_STEP).expm1().log())


@dataclass(frozen=True)
class Standardised:
    """Scales contexts to mean 0 and standard deviation 1; folded into the first linear layer after training.

    mean, deviation: [2 * value_dim], of the concatenation [mean value ; newest value].
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    @classmethod
    def of(cls, contexts: Contexts) -> "Standardised":
        joined = torch.cat([contexts.means, contexts.newest], dim=1)
        # The prompts of all chats end with the same token, so some inputs never vary; they are not scaled.
        deviation = joined.std(dim=0)
        return cls(joined.mean(dim=0), torch.where(deviation > 1e-6, deviation, 1.0))

    def __call__(self, contexts: Contexts) -> Contexts:
        joined = (torch.cat([contexts.means, contexts.newest], dim=1) - self.mean) / self.deviation
        return Contexts(*joined.chunk(2, dim=1))

    def absorb(self, predictor: BudgetPredictor) -> None:
        """Change the first layer so that it takes contexts that are not scaled."""
        w1 = predictor.module.w1
        with torch.no_grad():
            w1.weight.div_(self.deviation)
            w1.bias.sub_(w1.weight @ self.mean)
