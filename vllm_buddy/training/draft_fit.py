"""Trains the adapters of draft exits by KL from the whole model; the model, its bypass and the paths are frozen.

The states are those of first drafts: the newest token runs the path, the tokens before it have run all layers. Each
position of a text is one such draft, so one pass of the whole model and one of each path give a training example per
token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.errors import TrainingError
from vllm_buddy.method import DraftExit, ExitAdapter, LayerPath
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.draft_chains import draft_states, full_states
from vllm_buddy.method.draft_head import DraftHead
from vllm_buddy.method.exit_adapter import InducingAdapter
from vllm_buddy.training.draft_settings import DraftTrainingSettings
from vllm_buddy.training.loop import rate_share
from vllm_buddy.training.objective import agreement, distillation_loss, divergence, top_log_probs


@dataclass(frozen=True)
class Right:
    """How good first drafts are on the text that is held out.

    agreement: the share that is what the whole model says. divergence: from the whole model, nats per token.
    """

    agreement: float
    divergence: float


class DraftStates:
    """The states of first drafts of some paths, and what the whole model says.

    top: logits of the whole model that are kept.
    """

    def __init__(self, model: nn.Module, paths: Sequence[LayerPath], bypass: Bypass | None, top: int) -> None:
        net: Any = model
        self._model, self._paths, self._bypass = model, paths, bypass
        self.norm, self.head = net.model.norm, net.lm_head.weight
        self._top = min(top, len(self.head))

    @torch.no_grad()
    def of(self, token_ids: np.ndarray) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Return the state that each path ends in, float32 [batch, length, hidden_size], and the teacher's top.

        The top is that of top_log_probs. token_ids: [batch, length].
        """
        tokens = torch.from_numpy(token_ids.astype(np.int64)).to(self.head.device)
        hidden, full = full_states(self._model, tokens)
        states = [draft_states(self._model, tokens, path, 1, full, self._bypass)[0] for path in self._paths]
        return [s.float() for s in states], *top_log_probs(self.normed(hidden), self.head, self._top)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head gets of a state, in its dtype."""
        return self.norm(hidden).to(self.head.dtype)


def fit_adapters(
    states: DraftStates,
    batches: Sequence[np.ndarray],
    paths: Sequence[LayerPath],
    settings: DraftTrainingSettings,
    eps: float,
    report: Callable[[dict[str, Any]], None],
) -> list[DraftExit]:
    """Train one adapter for each path and return the exits, their weights rounded as an artifact stores them.

    batches: of each step, [batch, length] token ids. eps: of the model's RMSNorm. report: called with a log row after
    each step.

    Raises:
        TrainingError: a loss is not finite.
    """
    torch.manual_seed(settings.seed)
    adapters: list[InducingAdapter] = []
    optimizer: Any = None
    for step, token_ids in enumerate(batches):
        found, ids, log_p = states.of(token_ids)
        if not adapters:
            hidden_size, device = found[0].shape[-1], found[0].device
            adapters = [
                InducingAdapter(hidden_size, settings.rank, eps, float(state.abs().median())).to(device)
                for state in found
            ]
            parameters = [parameter for adapter in adapters for parameter in adapter.parameters()]
            optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
        rate = settings.learning_rate * rate_share(step, settings.warmup_steps, settings.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = []
        for adapter, state in zip(adapters, found, strict=True):
            loss = distillation_loss(states.normed(adapter(state)), states.head, ids, log_p)
            loss.backward()
            norm = float(nn.utils.clip_grad_norm_(adapter.parameters(), settings.clip))
            losses.append(float(loss.detach()))
            if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
                raise TrainingError(
                    f"step {step}: the loss is {losses[-1]} and the gradient's norm {norm}; lower learning_rate, or "
                    "look at the text of this step"
                )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        alphas = [float(adapter.alpha.detach()) for adapter in adapters]
        report({"step": step, "losses": losses, "alphas": alphas, "learning_rate": rate})
    return [DraftExit(path, adapter.folded().rounded()) for path, adapter in zip(paths, adapters, strict=True)]


@torch.no_grad()
def measure(
    states: DraftStates,
    sequences: np.ndarray,
    adapters: Sequence[ExitAdapter | None],
    vocabulary: np.ndarray | None = None,
) -> list[Right]:
    """Return how good the drafts of each path are.

    sequences: [n, length]. adapters: None: the path has none. vocabulary: the tokens that drafts choose among; None:
    all. The divergence is that of all tokens.
    """
    head = DraftHead.of(states.head, vocabulary)
    sums = np.zeros((len(adapters), 2))
    for sequence in sequences:
        found, ids, log_p = states.of(sequence[None])
        for number, (state, adapter) in enumerate(zip(found, adapters, strict=True)):
            hidden = states.normed(state if adapter is None else adapter.to(state).apply(state))
            right = agreement(hidden, head.weight, head.rows_of(ids[..., 0]))
            sums[number] += float(right), float(divergence(hidden, states.head, ids, log_p))
    return [Right(float(right), float(nats)) for right, nats in sums / len(sequences)]
