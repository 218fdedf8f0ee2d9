"""The training losses. They include the language-model head, so that logits are not kept for the backward pass."""

from collections.abc import Callable
from typing import Any

import torch

_SMALLEST_REST = 1e-6  # probability of all tokens outside the top, at least
RowLoss = Callable[[torch.Tensor, slice], torch.Tensor]

_ROWS = 128  # hidden states whose logits are in memory at once


class _HeadLoss(torch.autograd.Function):
    """The mean over rows of a loss of the logits. The head gets no gradient.

    row_loss: (log q [rows, vocab], slice of the rows) -> summed loss of these rows. It overwrites log q with the
    gradient of that loss with respect to the logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, row_loss: RowLoss) -> torch.Tensor:
        """hidden: [rows, hidden_size]; head: [vocab, hidden_size]."""
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), _ROWS):
            part = slice(start, start + _ROWS)
            logits = torch.nn.functional.linear(hidden[part], head)
            log_q = torch.nn.functional.log_softmax(logits, dim=-1, dtype=torch.float32)
            total += row_loss(log_q, part)
            gradient[part] = log_q.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream[0] / len(gradient)), None, None


def _masses(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return p of the top tokens, [rows, top], and what teacher and student give to all others, [rows, 1] each."""
    p = log_p.exp()
    p_rest, q_rest = ((1 - part.sum(dim=-1, keepdim=True)).clamp_min(_SMALLEST_REST) for part in (p, log_q.exp()))
    return p, p_rest, q_rest


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return the KL divergence of each row, [rows]."""
    p, p_rest, q_rest = _masses(log_p, log_q)
    return (p * (log_p - log_q)).sum(dim=-1) + (p_rest * (p_rest / q_rest).log())[:, 0]


def distillation_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    ids: torch.Tensor,
    log_p: torch.Tensor,
    per_token: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the KL divergence from the full model in nats per token.

    It is computed over the teacher's top tokens, with all other tokens as one more outcome.

    hidden: [batch, length, hidden_size], after the final norm. head: [vocab, hidden_size], frozen.
    ids, log_p: [batch, length, top], see Teacher. per_token: [batch, length], filled with the divergence of each token.
    """
    ids, log_p = ids.flatten(0, 1), log_p.flatten(0, 1)
    rows = None if per_token is None else per_token.view(-1)

    def row_loss(log_q: torch.Tensor, part: slice) -> torch.Tensor:
        top = log_q.gather(1, ids[part])
        p, p_rest, q_rest = _masses(log_p[part], top)
        # d KL / d logit is q - p for a top token, and q (1 - p_rest / q_rest) for any other.
        log_q.exp_().mul_(1 - p_rest / q_rest).scatter_(1, ids[part], top.exp() - p)
        divergences = _divergence(log_p[part], top)
        if rows is not None:
            rows[part] = divergences
        return divergences.sum()

    return _HeadLoss.apply(hidden.flatten(0, 1), head, row_loss)


@torch.no_grad()
def token_divergence(hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Return the divergence of `distillation_loss` of each token of one sequence, without a gradient: [length], nats.

    hidden: [length, hidden_size]. ids, log_p: [length, top]. head: as in `distillation_loss`.
    """
    logits = torch.nn.functional.linear(hidden, head)
    return _divergence(log_p, logits.gather(1, ids).float() - logits.float().logsumexp(dim=-1, keepdim=True))


@torch.no_grad()
def divergence(hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Return `distillation_loss` of each sequence without a gradient: [batch], nats per token. Same arguments."""
    rows = zip(hidden, ids, log_p, strict=True)
    return torch.stack([token_divergence(row, head, row_ids, row_log_p).mean() for row, row_ids, row_log_p in rows])


@torch.no_grad()
def agreement(hidden: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the share of positions of each sequence whose likeliest next token is that of `tokens`: [batch].

    hidden, head: as in `distillation_loss`. tokens: [batch, length].
    """
    rows = zip(hidden, tokens, strict=True)
    says = [(torch.nn.functional.linear(row, head).argmax(dim=-1) == wanted) for row, wanted in rows]
    return torch.stack(says).float().mean(dim=-1)


@torch.no_grad()
def top_log_probs(hidden: torch.Tensor, head: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `top` likeliest next tokens and their log p: int64 and float32, [batch, length, top].

    hidden: [batch, length, hidden_size], after the final norm.
    """
    ids, log_probs = [], []
    for row in hidden:
        logits = torch.nn.functional.linear(row, head).float()
        best, index = logits.topk(top, dim=-1)
        ids.append(index)
        log_probs.append(best - logits.logsumexp(dim=-1, keepdim=True))
    return torch.stack(ids), torch.stack(log_probs)


def next_token_loss(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of the next token in nats per token.

    hidden, head: as in `distillation_loss`. token_ids: [batch, length].
    """
    targets = token_ids[:, 1:].flatten()[:, None]

    def row_loss(log_q: torch.Tensor, part: slice) -> torch.Tensor:
        chosen = log_q.gather(1, targets[part])
        log_q.exp_().scatter_(1, targets[part], chosen.exp() - 1)
        return -chosen.sum()

    return _HeadLoss.apply(hidden[:, :-1].flatten(0, 1), head, row_loss)
