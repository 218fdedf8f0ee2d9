"""Group-relative policy optimisation (Shao et al. 2024), for actions of one decision each."""

import torch

SMALLEST_SPREAD = 1e-4  # nats; below it a batch says nothing


def group_advantages(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much better each action is than its group's mean, in units of the batch's spread; and that unit.

    rewards: [batch, group]. Depths differ far less in reward than examples do, and the group's mean takes the examples'
    part away. The unit is one for the whole batch: with one for each group, as BUDDY has it, an example on which depths
    differ by a hair counts as much as one on which they differ by a nat.

    Returns:
        advantages [batch, group]; the spread, a scalar.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    spread = centred.square().mean().sqrt().clamp_min(SMALLEST_SPREAD)
    return centred / spread, spread


def grpo_loss(log_pi: torch.Tensor, old_log_pi: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """-mean(pi / pi_old * A): the policy loss of a step on groups drawn from pi_old.

    log_pi, old_log_pi, advantages: [batch, group], of the actions drawn. With pi_old = pi the gradient is that of
    -mean(A log pi). Groups that hold every action once are drawn from the uniform policy; the loss then is the expected
    one, -sum(pi A), without sampling noise. There is one step per group, so nothing to clip.
    """
    return -((log_pi - old_log_pi.detach()).exp() * advantages).mean()


def entropy(log_pi: torch.Tensor) -> torch.Tensor:
    """Of policies over all their actions, nats. log_pi: [..., num_actions]."""
    return -(log_pi.exp() * log_pi).sum(dim=-1)
