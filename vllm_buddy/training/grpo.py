"""The loss of group-relative policy optimisation (GRPO, Shao et al. 2024) for policies that take a single action."""

import torch

SMALLEST_SPREAD = 1e-4  # nats; a batch with a smaller spread carries no information


def group_advantages(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the advantage of each action over the mean of its group, divided by the spread of the whole batch.

    rewards: [batch, group]. Rewards differ far less between depths than between examples; subtracting the group's mean
    removes the difference between examples. There is one divisor for the whole batch. With one for each group, as in
    BUDDY, an example whose depths differ by almost nothing would count as much as one whose depths differ by a nat.

    Returns:
        advantages [batch, group]; the spread, a scalar.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    spread = centred.square().mean().sqrt().clamp_min(SMALLEST_SPREAD)
    return centred / spread, spread


def grpo_loss(log_pi: torch.Tensor, old_log_pi: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Return -mean(pi / pi_old * A), the policy loss of one step on groups drawn from pi_old.

    log_pi, old_log_pi, advantages: [batch, group], of the actions drawn. With pi_old = pi the gradient is that of
    -mean(A log pi). A group that holds every action once counts as drawn from the uniform policy; the loss is then the
    expected one, -sum(pi A), without sampling noise. Each group is used for one step only, so clipping is not needed.
    """
    return -((log_pi - old_log_pi.detach()).exp() * advantages).mean()


def entropy(log_pi: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each policy in nats, [...]. log_pi: [..., num_actions], of all actions."""
    return -(log_pi.exp() * log_pi).sum(dim=-1)
