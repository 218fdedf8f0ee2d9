"""Computes the initial bypass: the best low-rank linear prediction of what each layer adds, in closed form.

One pass of the full model gives the regression of F(h), what a layer adds, on RMSNorm(h) for all middle layers at once.
Errors are weighted with G, the covariance of the loss's gradient after the layer (reduced-rank regression with the
output metric G), so that the rank is spent where it matters to the loss. Because SiLU(x) - SiLU(-x) = x, a bypass of
rank r can start as exactly a linear map of rank r / 2; training makes it nonlinear.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpointed

from vllm_buddy.method.batched import dense_layer, embed
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.sharded import backward, enter_layer, gathered, leave_layer
from vllm_buddy.training.objective import next_token_loss

RIDGE = 1e-3  # this share of the mean variance is added to every direction of the input
GRADIENT_FLOOR = 0.03  # this share of G's mean eigenvalue is added to every direction of the output
OUTLIER = 10.0  # tokens whose state has more than this many times the median norm (attention sinks) are left out
_BATCH_SIZE = 2  # sequences whose states and gradients are in memory at once; their logits never are


class LayerMoments:
    """Sums of outer products over tokens, from which one layer's regression is computed.

    xx, xy: RMSNorm(h) with itself and with F(h). gg: the loss's gradient after the layer with itself. All [hidden,
    hidden].
    """

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        self.xx, self.xy, self.gg = (torch.zeros(hidden_size, hidden_size, device=device) for _ in range(3))
        self.num_tokens = 0

    def add(self, before: torch.Tensor, after: torch.Tensor, gradient: torch.Tensor, eps: float) -> None:
        """Add the sums of some tokens.

        before, after: hidden states before and after the layer. gradient: of the loss, for `after`. All [tokens,
        hidden_size], float32.
        """
        norm = before.norm(dim=-1)
        keep = norm < OUTLIER * norm.median()
        x, y = before[keep], (after - before)[keep]
        x = nn.functional.rms_norm(x, x.shape[-1:], eps=eps)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.num_tokens += len(x)
        gradient = gradient[keep]
        self.gg += gradient.T @ gradient

    def low_rank(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (down [rank, hidden], up [hidden, rank]) of the best linear map; hidden units have variance 1."""
        size = len(self.xx)
        eye = torch.eye(size, dtype=torch.float64, device=self.xx.device)
        xx = self.xx.double() / self.num_tokens
        xx += RIDGE * xx.trace() / size * eye
        full = torch.linalg.solve(xx, self.xy.double() / self.num_tokens)  # [in, out]
        gg = self.gg.double()
        metric = gg / (gg.trace() / size) + GRADIENT_FLOOR * eye
        values, vectors = torch.linalg.eigh(metric)
        root, inverse_root = (vectors * values.pow(p) @ vectors.T for p in (0.5, -0.5))
        # The part of `full` of this rank that keeps most of the prediction, measured in the output metric.
        predicted = root @ full.T @ xx @ full @ root
        basis = torch.linalg.eigh(predicted)[1][:, -rank:]
        down = (full @ root @ basis).T
        up = inverse_root @ basis
        # With unit variance the hidden units lie where SiLU is nonlinear, and one learning rate fits all of them.
        scale = (down @ xx @ down.T).diagonal().clamp_min(1e-12).sqrt()
        return (down / scale[:, None]).float(), (up * scale).float()


def fit_bypass(
    model: nn.Module,
    token_ids: torch.Tensor,
    rank: int,
    *,
    checkpoint: bool = False,
    gaps: Sequence[range] | None = None,
) -> Bypass:
    """Return the initial bypass of all middle layers, or of ranges of layers.

    model: a Hugging Face Llama, Mistral, Qwen2 or Qwen3. token_ids: [num_sequences, length], int64. rank: even.
    checkpoint: keep no activations inside the layers for the backward pass but compute them again there.
    gaps: ranges of layers, each of which one bypass replaces; None: each middle layer.
    """
    if rank < 2 or rank % 2:
        raise ValueError(f"a bypass starts as pairs of units, so its rank must be even and positive, not {rank}")
    net: Any = model
    config = net.config
    device = net.model.embed_tokens.weight.device
    replaced = [range(i, i + 1) for i in range(1, config.num_hidden_layers - 1)] if gaps is None else gaps
    moments = [LayerMoments(config.hidden_size, device) for _ in replaced]
    for start in range(0, len(token_ids), _BATCH_SIZE):
        states = _states_with_gradient(net, token_ids[start : start + _BATCH_SIZE].to(device), checkpoint)
        for gap, moment in zip(replaced, moments):
            before, after = (states[i].detach().flatten(0, 1).float() for i in (gap.start, gap.stop))
            gradient = states[gap.stop].grad
            assert gradient is not None
            moment.add(before, after, gradient.flatten(0, 1).float() * gradient.shape[0], config.rms_norm_eps)
    pairs = [moment.low_rank(rank // 2) for moment in moments]
    return Bypass(
        torch.stack([torch.cat([down, -down]) for down, _ in pairs]),
        torch.stack([torch.cat([up, -up], dim=1) for _, up in pairs]),
        config.rms_norm_eps,
        None if gaps is None else tuple(gap.start for gap in gaps),
    )


def _states_with_gradient(net: Any, token_ids: torch.Tensor, checkpoint: bool) -> list[torch.Tensor]:
    """Return the hidden states before each layer and after the last, [batch, length, hidden], with their gradients."""
    backbone = net.model
    hidden, rotary = embed(net, token_ids)
    states = [hidden]
    run = partial(checkpointed, dense_layer, use_reentrant=False) if checkpoint else dense_layer
    with torch.enable_grad():
        for index, layer in enumerate(backbone.layers):
            hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
            hidden.retain_grad()
            states[-1] = hidden
            hidden = leave_layer(net, index, run(layer, enter_layer(net, index, hidden), rotary))
            states.append(hidden)
        hidden.retain_grad()
        with gathered(net.lm_head):
            loss = next_token_loss(backbone.norm(hidden), net.lm_head.weight, token_ids)
        backward(net, loss)
    return states
