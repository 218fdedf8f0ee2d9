"""The GRPO policy loss of stage 2."""

import math
from types import SimpleNamespace

import pytest
import torch

from vllm_buddy.training.grpo import entropy, group_advantages, grpo_loss

ENTROPY_BONUS = 0.3
EXACT = {"rtol": 1e-5, "atol": 1e-6}  # float32 and the same sums


def test_what_examples_differ_by_is_gone_and_what_depths_differ_by_stays() -> None:
    """Fails if differences of 1 to 4 nats between examples hide differences of 0.01 between depths."""
    between_depths = torch.tensor([[0.0, 0.01], [0.0, -0.03]])
    advantages, spread = group_advantages(between_depths + torch.tensor([[-1.0], [4.0]]))
    torch.testing.assert_close(advantages * spread, torch.tensor([[-0.005, 0.005], [0.015, -0.015]]), atol=1e-6, rtol=0)
    # Sizes are kept: the second example matters three times as much.
    assert advantages[1, 0] / advantages[0, 1] == pytest.approx(3.0, rel=1e-3)


def test_a_batch_that_says_nothing_moves_nothing() -> None:
    """Fails if rewards that are equal up to noise give large advantages."""
    advantages, _ = group_advantages(torch.full((4, 3), 2.5))
    assert advantages.abs().max() < 1e-2


def test_groups_of_every_action_are_the_expected_loss() -> None:
    """Fails if groups of all actions have another gradient than the mean over groups that are drawn from the policy."""
    torch.manual_seed(0)
    logits = torch.randn(1, 4, requires_grad=True)
    rewards = torch.randn(1, 4)
    log_pi = logits.log_softmax(dim=1)
    uniform = torch.full_like(log_pi, -math.log(4))
    (whole,) = torch.autograd.grad(grpo_loss(log_pi, uniform, rewards), logits, retain_graph=True)
    actions = log_pi.detach().exp().expand(20_000, -1).multinomial(8, replacement=True)
    drawn = log_pi.expand(20_000, -1).gather(1, actions)
    centred = rewards - (log_pi.detach().exp() * rewards).sum()
    (sampled,) = torch.autograd.grad(grpo_loss(drawn, drawn, centred.expand(20_000, -1).gather(1, actions)), logits)
    torch.testing.assert_close(sampled, whole, atol=0.01, rtol=0)  # 160,000 draws have a standard error near 0.003


def test_trl_computes_the_same_loss_and_gradient() -> None:
    """Fails if loss or gradient differs from an independent implementation, TRL's GRPOTrainer on single tokens."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="pip install trl, for this comparison alone")
    torch.manual_seed(1)
    logits = torch.randn(6, 5)
    actions, advantages = torch.randint(5, (6, 4)), torch.randn(6, 4)
    old = torch.randn(6, 5).log_softmax(dim=1).gather(1, actions)
    for old_log_pi in (old, None):
        ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
        log_pi = ours.log_softmax(dim=1).gather(1, actions)
        policy_loss = grpo_loss(log_pi, log_pi if old_log_pi is None else old_log_pi, advantages)
        loss = policy_loss - ENTROPY_BONUS * entropy(ours.log_softmax(dim=1)).mean()
        loss.backward()
        wanted = _trl_loss(trainer, theirs, actions, advantages, old_log_pi)
        wanted.backward()
        torch.testing.assert_close(loss, wanted, **EXACT)
        torch.testing.assert_close(ours.grad, theirs.grad, **EXACT)


def _trl_loss(trainer, logits, actions, advantages, old_log_pi):
    """Return TRL's loss of groups of one-token completions, with neither clipping nor a reference model."""

    from accelerate import Accelerator

    def log_probs(*args, **kwargs):
        log_pi = logits.log_softmax(dim=1)
        spread = -(log_pi.exp() * log_pi).sum(dim=1, keepdim=True)
        return log_pi.gather(1, actions).flatten()[:, None], spread.expand(-1, actions.shape[1]).flatten()[:, None], 0

    class Stub:
        """Has the attributes that _compute_loss reads."""

        def __getattr__(self, name):
            return None

    stub = Stub()
    stub.__dict__ |= {
        "_get_per_token_logps_and_entropies": log_probs,
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "loss_type": "grpo",
        "epsilon_low": 1e9,
        "epsilon_high": 1e9,
        "use_vllm": False,
        "_entropy_bonus_enabled": True,
        "entropy_coef": ENTROPY_BONUS,
        "current_gradient_accumulation_steps": 1,
        "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(delta=None, report_to=[]),
        "accelerator": Accelerator(cpu=True),
        "_metrics": {"train": _Lists(), "eval": _Lists()},
    }
    one = torch.ones(actions.numel(), 1, dtype=torch.long)
    inputs = {"prompt_ids": one, "prompt_mask": one, "completion_ids": one, "completion_mask": one}
    inputs["advantages"] = advantages.flatten()
    if old_log_pi is not None:
        inputs["old_per_token_logps"] = old_log_pi.flatten()[:, None]
    return trainer.GRPOTrainer._compute_loss(stub, None, inputs)


class _Lists(dict):
    """A dictionary with an empty list for every missing key."""

    def __missing__(self, key):
        self[key] = []
        return self[key]
