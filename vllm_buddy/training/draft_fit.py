"""Trains draft exits by KL from the whole model, which stays as it is: bypasses of the path's gaps, and the adapter.

Trained are first drafts: the newest token runs the path, the tokens before it have run all layers. Each position of a
text is one such draft, so one pass of the whole model and one of each path give a training example per token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.errors import TrainingError
from vllm_buddy.method import DraftExit, ExitAdapter, LayerPath
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.draft_chains import KV, draft_states, full_states
from vllm_buddy.method.draft_head import DraftHead
from vllm_buddy.method.exit_adapter import InducingAdapter
from vllm_buddy.method.path import gap_starts, gaps_of
from vllm_buddy.training.draft_settings import DraftTrainingSettings
from vllm_buddy.training.loop import rate_share
from vllm_buddy.training.objective import agreement, distillation_loss, divergence, top_log_probs
from vllm_buddy.training.regression import fit_bypass


@dataclass(frozen=True)
class Right:
    """How good first drafts are on the text that is held out.

    agreement: the share that is what the whole model says. divergence: from the whole model, nats per token.
    """

    agreement: float
    divergence: float


@dataclass(frozen=True)
class Lesson:
    """A text, and what the whole model makes of it.

    token_ids: [batch, length]. full: K and V of its layers. ids, log_p: of the likeliest next tokens, as
    top_log_probs returns them.
    """

    token_ids: torch.Tensor
    full: list[KV]
    ids: torch.Tensor
    log_p: torch.Tensor


class DraftTeacher:
    """The whole model, and drafts of its layers. top: logits of the whole model that are kept."""

    def __init__(self, model: nn.Module, top: int) -> None:
        net: Any = model
        self._model = model
        self.norm, self.head = net.model.norm, net.lm_head.weight
        self._top = min(top, len(self.head))

    @torch.no_grad()
    def read(self, token_ids: np.ndarray) -> Lesson:
        """Run the whole model. token_ids: [batch, length]."""
        tokens = torch.from_numpy(token_ids.astype(np.int64)).to(self.head.device)
        hidden, full = full_states(self._model, tokens)
        return Lesson(tokens, full, *top_log_probs(self.normed(hidden), self.head, self._top))

    def drafted(self, lesson: Lesson, path: LayerPath, bypass: Bypass | None) -> torch.Tensor:
        """The states that first drafts on a path end in, float32 [batch, length, hidden_size]."""
        return draft_states(self._model, lesson.token_ids, path, 1, lesson.full, bypass)[0].float()

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head gets of a state, in its dtype."""
        return self.norm(hidden).to(self.head.dtype)


class TrainedExit(nn.Module):
    """A draft exit in training.

    gaps: where the bypasses of its gaps start; None: it has none, and skipped layers have `bypass`.
    """

    def __init__(self, path: LayerPath, gaps: Bypass | None, bypass: Bypass | None, adapter: InducingAdapter) -> None:
        super().__init__()
        self.path, self.adapter = path, adapter
        self._gaps, self._bypass = gaps, bypass
        # Each matrix is a parameter of its own, because Muon works on matrices.
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        if gaps is not None:
            self.down.extend(gaps.down.clone().unbind())
            self.up.extend(gaps.up.clone().unbind())

    @property
    def matrices(self) -> list[nn.Parameter]:
        """Those of the bypasses of gaps."""
        return [*self.down, *self.up]

    def bypass(self) -> Bypass | None:
        """What skipped rows go through, with gradients where it is trained."""
        if self._gaps is None:
            return self._bypass
        return replace(self._gaps, down=torch.stack([*self.down]), up=torch.stack([*self.up]))

    def forward(self, teacher: DraftTeacher, lesson: Lesson) -> torch.Tensor:
        """Return the states before the model's last norm, float32 [batch, length, hidden_size]."""
        with torch.set_grad_enabled(self._gaps is not None):
            state = teacher.drafted(lesson, self.path, self.bypass())
        return self.adapter(state)

    @torch.no_grad()
    def served(self) -> DraftExit:
        """The exit with weights rounded as an artifact stores them."""
        own = None if self._gaps is None else self.bypass()
        return DraftExit(self.path, self.adapter.folded().rounded(), own and own.rounded())


def fit_gaps(model: nn.Module, token_ids: torch.Tensor, rank: int, paths: Sequence[LayerPath]) -> list[Bypass]:
    """Return the initial bypasses of the gaps of each path: those that best predict what the skipped layers add.

    token_ids: [num_sequences, length], int64. rank: even.
    """
    gaps = [gaps_of(path) for path in paths]
    known = list(dict.fromkeys(gap for of_path in gaps for gap in of_path))
    found = fit_bypass(model, token_ids, rank, gaps=known)
    rows = [[known.index(gap) for gap in of_path] for of_path in gaps]
    return [Bypass(found.down[which], found.up[which], found.eps, gap_starts(path)) for which, path in zip(rows, paths)]


def fit_exits(
    teacher: DraftTeacher,
    batches: Sequence[np.ndarray],
    paths: Sequence[LayerPath],
    starts: Sequence[Bypass | None],
    bypass: Bypass | None,
    settings: DraftTrainingSettings,
    report: Callable[[dict[str, Any]], None],
) -> list[DraftExit]:
    """Train one exit for each path, and return them with weights rounded as an artifact stores them.

    batches: of each step, [batch, length] token ids. starts: of each path the bypasses of its gaps before training;
    None: they get none. bypass: of the artifact. report: called with a log row after each step.

    Raises:
        TrainingError: a loss is not finite.
    """
    torch.manual_seed(settings.seed)
    exits: list[TrainedExit] = []
    optimizers: list[torch.optim.Optimizer] = []
    for step, token_ids in enumerate(batches):
        lesson = teacher.read(token_ids)
        if not exits:
            exits = [_new(teacher, lesson, path, start, bypass, settings) for path, start in zip(paths, starts)]
            optimizers = _optimizers(exits, settings)
        share = rate_share(step, settings.warmup_steps, settings.num_steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
        losses = []
        for one in exits:
            loss = distillation_loss(teacher.normed(one(teacher, lesson)), teacher.head, lesson.ids, lesson.log_p)
            loss.backward()
            norm = float(nn.utils.clip_grad_norm_(one.parameters(), settings.clip))
            losses.append(float(loss.detach()))
            if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
                raise TrainingError(
                    f"step {step}: the loss is {losses[-1]} and the gradient's norm {norm}; lower learning_rate or "
                    "gap_learning_rate, or look at the text of this step"
                )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        alphas = [float(one.adapter.alpha.detach()) for one in exits]
        report({"step": step, "losses": losses, "alphas": alphas, "share_of_rate": share})
    return [one.served() for one in exits]


def _new(
    teacher: DraftTeacher,
    lesson: Lesson,
    path: LayerPath,
    start: Bypass | None,
    bypass: Bypass | None,
    settings: DraftTrainingSettings,
) -> TrainedExit:
    state = teacher.drafted(lesson, path, bypass if start is None else start).detach()
    adapter = InducingAdapter(
        state.shape[-1], settings.rank, teacher.norm.variance_epsilon, float(state.abs().median())
    )
    return TrainedExit(path, start, bypass, adapter).to(state.device)


def _optimizers(exits: Sequence[TrainedExit], settings: DraftTrainingSettings) -> list[torch.optim.Optimizer]:
    """AdamW for adapters, Muon for the bypasses of gaps, as for bypasses in stage 1; "peak" in a group is its rate."""
    adapters = [parameter for one in exits for parameter in one.adapter.parameters()]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(adapters, settings.learning_rate, weight_decay=settings.weight_decay)
    ]
    if gaps := [matrix for one in exits for matrix in one.matrices]:
        rate = settings.gap_learning_rate
        found.append(torch.optim.Muon(gaps, rate, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


@torch.no_grad()
def measure(
    teacher: DraftTeacher,
    sequences: np.ndarray,
    exits: Sequence[tuple[LayerPath, Bypass | None, ExitAdapter | None]],
    vocabulary: np.ndarray | None = None,
) -> list[Right]:
    """Return how good the drafts of each exit are.

    sequences: [n, length]. exits: paths with what skipped rows go through, and the adapter after it; None: nothing.
    vocabulary: the tokens that drafts choose among; None: all. The divergence is that of all tokens.
    """
    head = DraftHead.of(teacher.head, vocabulary)
    sums = np.zeros((len(exits), 2))
    for sequence in sequences:
        lesson = teacher.read(sequence[None])
        for number, (path, bypass, adapter) in enumerate(exits):
            state = teacher.drafted(lesson, path, bypass)
            hidden = teacher.normed(state if adapter is None else adapter.to(state).apply(state))
            right = agreement(hidden, head.weight, head.rows_of(lesson.ids[..., 0]))
            sums[number] += float(right), float(divergence(hidden, teacher.head, lesson.ids, lesson.log_p))
    return [Right(float(right), float(nats)) for right, nats in sums / len(sequences)]
