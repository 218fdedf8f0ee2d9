"""Fits the router of single tokens: what each of a few nested paths costs at a token, from observed divergences.

An observation is the divergence from the full model of a token that ran one of the paths. At first every path is run
over the same sequences, all tokens on it. During training the tokens run mixtures of paths, and each step observes what
they cost. The router's predictor learns the expected divergence from the token and the ones just before it, by least
squares: the mean is what a choice of least cost needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.method import BudgetPredictor, FoldedPredictor, LayerPath
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.forked import forked_hidden
from vllm_buddy.method.sharded import gathered
from vllm_buddy.method.token_router import DECAY, TokenRouter
from vllm_buddy.training.objective import token_divergence
from vllm_buddy.training.observations import Observations
from vllm_buddy.training.teacher import Teacher

WIDTH = 64
STEPS = 1500
BATCH = 8  # sequences
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
HELD_OUT = 0.2  # share of the sequences
_PRICES = np.geomspace(0.01, 30.0, 60)
_MOST_PRICED = 64  # sequences on which budgets of prices are counted


@dataclass(frozen=True)
class TokenFit:
    """explained: share of the variance of each shallower path's divergence that is explained on held-out sequences."""

    router: TokenRouter
    explained: tuple[float, ...]


@torch.no_grad()
def measure_tokens(
    model: Any,
    bypass: Bypass | None,
    teacher: Teacher,
    sequences: np.ndarray,
    indices: np.ndarray,
    paths: Sequence[LayerPath],
) -> Observations:
    """Observe every token of sequences[indices] on each path, all tokens of a sequence on the same one.

    The last path is the whole model, which costs nothing.
    """
    device, length = next(model.parameters()).device, sequences.shape[1]
    divergences = np.zeros((len(indices), len(paths), length), dtype=np.float32)
    for row, index in zip(divergences, indices):
        token_ids = torch.from_numpy(sequences[index].astype(np.int64)).to(device)
        hidden = model.model.norm(forked_hidden(model, token_ids, paths[:-1], bypass))
        ids, log_p = (part[0].to(device) for part in teacher.top_log_probs(np.array([index])))
        with gathered(model.lm_head):
            for number, state in enumerate(hidden):
                row[number] = token_divergence(state, model.lm_head.weight, ids, log_p).cpu().numpy()
    choices = np.broadcast_to(np.arange(len(paths))[:, None], divergences.shape)
    return Observations(np.repeat(indices, len(paths)), choices.reshape(-1, length), divergences.reshape(-1, length))


def fit_tokens(
    observed: Observations,
    sequences: np.ndarray,
    values: torch.Tensor,
    paths: Sequence[LayerPath],
    num_layers: int,
    seed: int,
) -> TokenFit:
    """Fit a TokenRouter.

    sequences: [num_sequences, length], token ids of the corpus. values: [vocab_size, value_dim], see
    decision.value_table.
    """
    depths = tuple(path.bit_count() for path in paths)
    held, fitted = _split(observed)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    # One step beyond the full depth: what a token costs there, because of what shallower ones before it left.
    predictor = BudgetPredictor(values.shape[1], (*depths, num_layers + 1), num_layers, hidden=WIDTH)
    sample = rng.permutation(fitted)[: 8 * BATCH]
    _start_at_mean(predictor, observed, sample)
    scale_features(predictor, values[torch.from_numpy(sequences[observed.sequences[sample]].astype(np.int64))])
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            rows = rng.choice(fitted, BATCH)
            predicted, wanted, _ = _predict(predictor, observed, sequences, values, rows)
            loss = (predicted - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    explained = _explained(predictor, observed, sequences, values, held)
    folded = FoldedPredictor.fold(_without_floor(predictor, depths, num_layers), values, num_layers)
    router = TokenRouter(folded, tuple(paths), ((depths[0] / num_layers, 1.0), (1.0, 1.0)))
    texts = np.unique(observed.sequences[held])[:_MOST_PRICED]
    return TokenFit(TokenRouter(folded, tuple(paths), price_points(router, sequences[texts])), explained)


def price_points(router: TokenRouter, token_ids: np.ndarray) -> tuple[tuple[float, float], ...]:
    """What mean budget each price comes to where no account limits it, ascending in budget.

    token_ids: [num_sequences, length].
    """
    depths, num_layers = np.array(router.depths), router.num_layers
    costs = np.concatenate([router.excess(router.recent_mean(), row.tolist()) for row in token_ids])
    lowest = depths[0] / num_layers
    points = {lowest: float(_PRICES[-1]), 1.0: 0.0}
    for price in _PRICES:
        mean = float(depths[(costs + price * depths / num_layers).argmin(axis=1)].mean()) / num_layers
        if lowest < mean < 1.0:
            points[round(mean, 6)] = float(price)
    return tuple(sorted(points.items()))


def _split(observed: Observations) -> tuple[np.ndarray, np.ndarray]:
    """Rows of held-out sequences, and the others. A sequence that was observed several times is on one side."""
    texts = np.unique(observed.sequences)
    held = np.random.default_rng(0).permutation(texts)[: max(1, int(len(texts) * HELD_OUT))]
    is_held = np.isin(observed.sequences, held)
    return np.flatnonzero(is_held), np.flatnonzero(~is_held)


def _predict(
    predictor: BudgetPredictor, observed: Observations, sequences: np.ndarray, values: torch.Tensor, rows: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predicted and observed divergence of the tokens of `rows`, and their choices: [len(rows), length] each."""
    newest = values[torch.from_numpy(sequences[observed.sequences[rows]].astype(np.int64))]
    choices = torch.from_numpy(observed.choices[rows].astype(np.int64))
    excess = predictor.excess(recent_mean(newest, DECAY), newest)
    predicted = excess.gather(-1, choices[..., None])[..., 0]
    return predicted, torch.from_numpy(observed.divergences[rows].astype(np.float32)), choices


@torch.no_grad()
def _explained(
    predictor: BudgetPredictor, observed: Observations, sequences: np.ndarray, values: torch.Tensor, rows: np.ndarray
) -> tuple[float, ...]:
    parts = [_predict(predictor, observed, sequences, values, rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    predicted, wanted, choices = (torch.cat(part).flatten() for part in zip(*parts))
    shares = []
    for choice in range(len(predictor.depths) - 2):  # neither the full depth nor the step beyond it
        chosen = choices == choice
        residual, total = ((part[chosen] - part[chosen].mean()).square().sum() for part in (predicted - wanted, wanted))
        shares.append(float(1 - residual / total.clamp_min(1e-12)))
    return tuple(shares)


def recent_mean(values: torch.Tensor, decay: float) -> torch.Tensor:
    """The decaying mean that TokenRouter sees, at each position: like values, [num_sequences, length, value_dim]."""
    means, mean = [], torch.zeros_like(values[:, 0])
    for value in values.unbind(dim=1):
        mean = decay * mean + (1 - decay) * value
        means.append(mean)
    return torch.stack(means, dim=1)


def _without_floor(predictor: BudgetPredictor, depths: Sequence[int], num_layers: int) -> BudgetPredictor:
    """The predictor of what a path costs more than the full depth does."""
    value_dim, hidden = predictor.module.w1.in_features // 2, predictor.module.w1.out_features
    result = BudgetPredictor(value_dim, depths, num_layers, hidden)
    state = predictor.module.state_dict()
    state |= {name: state[name][:-1] for name in ("w2.weight", "w2.bias")}
    result.module.load_state_dict(state)
    return result


def _start_at_mean(predictor: BudgetPredictor, observed: Observations, rows: np.ndarray) -> None:
    """Let the predictor begin with the mean divergence of each path, whatever the token."""
    choices, divergences = observed.choices[rows], observed.divergences[rows].astype(np.float32)
    known = [divergences[choices == number] for number in range(len(predictor.depths) - 1)]
    means = torch.tensor([float(part.mean()) if len(part) else 0.0 for part in known] + [0.0])
    with torch.no_grad():
        predictor.module.w2.weight.mul_(0.1)
        predictor.module.w2.bias.copy_((means[:-1] - means[1:]).clamp_min(1e-3).expm1().log())


def scale_features(predictor: BudgetPredictor, newest: torch.Tensor) -> None:
    """Scale the first layer's weights to features of unit variance. newest: [..., value_dim]."""
    with torch.no_grad():
        scale = newest.flatten(0, -2).std(dim=0).clamp_min(1e-6)
        w_mean, w_newest = predictor.module.w1.weight.chunk(2, dim=1)
        w_newest.div_(scale * newest.shape[-1] ** 0.25)
        w_mean.div_(scale * newest.shape[-1] ** 0.25)
    nn.init.zeros_(predictor.module.w1.bias)
