"""Fits the router of single tokens: what each of a few nested paths costs at a token, from measured divergences.

Every path is run over the same sequences, all tokens on it, and the KL divergence of each token from the full model is
measured. The router's predictor then learns the expected divergence from the token and the running mean before it, by
least squares: the mean is what a choice of least cost needs.
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
from vllm_buddy.method.token_router import TokenRoute, TokenRouter, TokenSchedule
from vllm_buddy.training.objective import token_divergence
from vllm_buddy.training.teacher import Teacher

WIDTH = 64
STEPS = 1500
BATCH = 4096  # tokens
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
HELD_OUT = 0.2  # share of the sequences
_PRICES = np.geomspace(0.01, 30.0, 60)


@dataclass(frozen=True)
class TokenDivergences:
    """Divergences of each token on each path.

    token_ids: [num_sequences, length]. divergences: [num_sequences, length, num_paths], float32, nats; the last path is
    the whole model, so its column is zero.
    """

    token_ids: np.ndarray
    divergences: np.ndarray


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
    paths: Sequence[int],
) -> TokenDivergences:
    """Measure the divergence of every token of sequences[indices] on each path; the last path is the whole model."""
    device, rows = next(model.parameters()).device, []
    for index in indices:
        token_ids = torch.from_numpy(sequences[index].astype(np.int64)).to(device)
        hidden = model.model.norm(forked_hidden(model, token_ids, paths[:-1], bypass))
        ids, log_p = (part[0].to(device) for part in teacher.top_log_probs(np.array([index])))
        found = [token_divergence(h, model.lm_head.weight, ids, log_p).cpu().numpy() for h in hidden]
        rows.append(np.stack([*found, np.zeros_like(found[0])], axis=1))
    return TokenDivergences(sequences[indices], np.stack(rows))


def fit_tokens(
    measured: TokenDivergences, values: torch.Tensor, paths: Sequence[LayerPath], num_layers: int, seed: int
) -> TokenFit:
    """Fit a TokenRouter. values: [vocab_size, value_dim], see decision.value_table."""
    depths = tuple(path.bit_count() for path in paths)
    token_ids = torch.from_numpy(measured.token_ids.astype(np.int64))
    target = torch.from_numpy(measured.divergences).float()
    newest = values[token_ids]
    counts = torch.arange(1, token_ids.shape[1] + 1, dtype=torch.float32)[None, :, None]
    means = newest.cumsum(dim=1) / counts
    num_held = max(1, int(len(token_ids) * HELD_OUT))
    held, fitted = slice(0, num_held), slice(num_held, None)
    torch.manual_seed(seed)
    predictor = BudgetPredictor(values.shape[1], depths, num_layers, hidden=WIDTH)
    _start_at_mean(predictor, target[fitted].flatten(0, 1))
    scale_features(predictor, newest[fitted].flatten(0, 1))
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    rows = [part[fitted].flatten(0, 1) for part in (means, newest, target)]
    rng = np.random.default_rng(seed)
    with torch.enable_grad():
        for _ in range(STEPS):
            chosen = torch.from_numpy(rng.integers(0, len(rows[0]), BATCH))
            mean, new, wanted = (part[chosen] for part in rows)
            loss = (predictor.excess(mean, new) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        residual = (predictor.excess(means[held], newest[held]) - target[held]).flatten(0, 1).var(dim=0)
        explained = 1 - residual / target[held].flatten(0, 1).var(dim=0).clamp_min(1e-12)
    folded = FoldedPredictor.fold(predictor, values, num_layers)
    router = TokenRouter(folded, tuple(paths), ((depths[0] / num_layers, 1.0), (1.0, 1.0)))
    prices = price_points(router, measured.token_ids[held])
    return TokenFit(TokenRouter(folded, tuple(paths), prices), tuple(explained[:-1].tolist()))


def price_points(router: TokenRouter, token_ids: np.ndarray) -> tuple[tuple[float, float], ...]:
    """What mean budget each price comes to where no account limits it, ascending in budget.

    token_ids: [num_sequences, length].
    """
    depths, num_layers = np.array(router.depths), router.num_layers
    excess = []
    for row in token_ids:
        route = TokenRoute(router, TokenSchedule(), 1.0, row.tolist())
        route.decide(len(row), row.tolist())
        excess.append(route.excess)
    costs = np.concatenate(excess)
    points: dict[float, float] = {depths[0] / num_layers: float(_PRICES[-1]), 1.0: 0.0}
    for price in _PRICES:
        chosen = depths[(costs + price * depths / num_layers).argmin(axis=1)]
        points[round(float(chosen.mean()) / num_layers, 6)] = float(price)
    return tuple(sorted(points.items()))


def _start_at_mean(predictor: BudgetPredictor, target: torch.Tensor) -> None:
    """Let the predictor begin with the mean divergence of each path, whatever the token."""
    gaps = (target[:, :-1] - target[:, 1:]).mean(dim=0).clamp_min(1e-3)
    with torch.no_grad():
        predictor.module.w2.weight.mul_(0.1)
        predictor.module.w2.bias.copy_(gaps.expm1().log())


def scale_features(predictor: BudgetPredictor, newest: torch.Tensor) -> None:
    """Scale the first layer's weights to features of unit variance."""
    with torch.no_grad():
        scale = newest.std(dim=0).clamp_min(1e-6)
        w_mean, w_newest = predictor.module.w1.weight.chunk(2, dim=1)
        w_newest.div_(scale * newest.shape[1] ** 0.25)
        w_mean.div_(scale)
    nn.init.zeros_(predictor.module.w1.bias)
