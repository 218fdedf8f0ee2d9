"""What training minimises, with the language-model head inside: logits are never kept for the backward pass."""

from typing import Any

import torch

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
            p = log_p[part].exp()
            p_rest = (1 - p.sum(dim=-1, keepdim=True)).clamp_min(1e-6)
            q_rest = (1 - log_q.exp().sum(dim=-1, keepdim=True)).clamp_min(1e-6)
            total += (p * (log_p[part] - log_q)).sum() + (p_rest * (p_rest / q_rest).log()).sum()
            q.exp_().mul_(1 - p_rest / q_rest).scatter_(1, ids[part], log_q.exp() - p)
            gradient[part] = q.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream[0] / len(gradient)), None, None, None


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


def next_token_loss(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each next token, nats per token. hidden, head: as above; token_ids: [batch, length]."""
    return _CrossEntropy.apply(hidden[:, :-1].flatten(0, 1), head, token_ids[:, 1:].flatten())
