"""What training minimises, with the language-model head inside: logits are never kept for the backward pass."""

from typing import Any

import torch

_SMALLEST_REST = 1e-6  # probability
_ROWS = 512  # hidden states whose logits exist at once


class _TopKL(torch.autograd.Function):
    """KL(teacher || student) over the teacher's top tokens and one bucket for all others.

    d KL / d logit_j is q_j - p_j for a top token, and q_j (1 - p_rest / q_rest) for any other.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, log_p: torch.Tensor
    ) -> torch.Tensor:
        """hidden: [rows, hidden_size]; weight: [vocab, hidden_size]; ids, log_p: [rows, top]."""
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), _ROWS):
            part = slice(start, start + _ROWS)
            q = torch.nn.functional.linear(hidden[part], weight).float()
            q -= q.logsumexp(dim=-1, keepdim=True)
            log_q = q.gather(1, ids[part])
            p, p_rest, q_rest = _masses(log_p[part], log_q)
            total += _divergence(log_p[part], log_q).sum()
            q.exp_().mul_(1 - p_rest / q_rest).scatter_(1, ids[part], log_q.exp() - p)
            gradient[part] = q.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream[0] / len(gradient)), None, None, None


def _masses(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p of the top tokens [rows, top], and what teacher and student give to all others [rows, 1]."""
    p = log_p.exp()
    p_rest, q_rest = ((1 - part.sum(dim=-1, keepdim=True)).clamp_min(_SMALLEST_REST) for part in (p, log_q.exp()))
    return p, p_rest, q_rest


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL of each row, [rows]."""
    p, p_rest, q_rest = _masses(log_p, log_q)
    return (p * (log_p - log_q)).sum(dim=-1) + (p_rest * (p_rest / q_rest).log())[:, 0]


class _CrossEntropy(torch.autograd.Function):
    """Next-token cross-entropy."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """hidden: [rows, hidden_size]; weight: [vocab, hidden_size]; targets: [rows]."""
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), _ROWS):
            part = slice(start, start + _ROWS)
            q = torch.nn.functional.linear(hidden[part], weight).float()
            q -= q.logsumexp(dim=-1, keepdim=True)
            target = targets[part, None]
            log_q = q.gather(1, target)
            total -= log_q.sum()
            q.exp_().scatter_(1, target, log_q.exp() - 1)
            gradient[part] = q.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream[0] / len(gradient)), None, None


def distillation_loss(hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """KL from the full model, nats per token, over the teacher's top tokens and the rest as one.

    hidden: [batch, length, hidden_size], behind the final norm. head: [vocab, hidden_size], frozen.
    ids, log_p: [batch, length, top], see Teacher.
    """
    return _TopKL.apply(hidden.flatten(0, 1), head, ids.flatten(0, 1), log_p.flatten(0, 1))


@torch.no_grad()
def divergence(hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """`distillation_loss` without a gradient, of each sequence: [batch], nats per token. Arguments as there."""
    rows = []
    for row, row_ids, row_log_p in zip(hidden, ids, log_p, strict=True):
        logits = torch.nn.functional.linear(row, head)
        log_q = logits.gather(1, row_ids).float() - logits.float().logsumexp(dim=-1, keepdim=True)
        rows.append(_divergence(row_log_p, log_q).mean())
    return torch.stack(rows)


@torch.no_grad()
def top_log_probs(hidden: torch.Tensor, head: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top` likeliest next tokens and their log p: int64 and float32, [batch, length, top]. hidden: normed."""
    ids, log_probs = [], []
    for row in hidden:
        logits = torch.nn.functional.linear(row, head).float()
        best, index = logits.topk(top, dim=-1)
        ids.append(index)
        log_probs.append(best - logits.logsumexp(dim=-1, keepdim=True))
    return torch.stack(ids), torch.stack(log_probs)


def next_token_loss(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each next token, nats per token. hidden, head: as above; token_ids: [batch, length]."""
    return _CrossEntropy.apply(hidden[:, :-1].flatten(0, 1), head, token_ids[:, 1:].flatten())
