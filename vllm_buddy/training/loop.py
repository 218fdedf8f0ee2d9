"""The training loop of stage 1: optimizer steps, log and checkpoints."""

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.errors import TrainingError
from vllm_buddy.method.batched import routed_hidden
from vllm_buddy.method.budget import depth_for_budget
from vllm_buddy.method.sharded import backward, gathered
from vllm_buddy.training.checkpoint import CHECKPOINT_FILE, load_state, save_state
from vllm_buddy.training.corpus import Corpus
from vllm_buddy.training.objective import distillation_loss, divergence, next_token_loss
from vllm_buddy.training.observations import Observations
from vllm_buddy.training.repair import Repair
from vllm_buddy.training.routing import Routing, draw_depths
from vllm_buddy.training.stage1_settings import Stage1Settings
from vllm_buddy.training.teacher import Teacher

LOG_FILE = "log.jsonl"
FINAL_RATE = 0.1  # the learning rate ends at this share of its peak


@dataclass
class TrainingRun:
    """One run of stage 1: its model, data and settings, and the loop that trains.

    teacher: None if the loss is cross-entropy. accelerator: accelerate's Accelerator, for one or several processes.
    frozen: a context manager inside which the model is the unchanged base model, which the teacher needs.
    report: called with the log row of each step. observations: what tokens cost, for a routing that chooses their
    depths one by one; refit: called with the number of steps done, every `settings.refit_steps` steps, to fit that
    routing to them. origin: hash of the base model's weights and of what training starts from.
    For the record of the run: router_figures, the results of the router fit; started_from, name and digest of the
    artifact whose bypass was trained on; lengths, (first step, tokens) for each number of tokens that the run had.
    """

    settings: Stage1Settings
    corpus: Corpus
    model: Any
    repair: Repair
    routing: Routing
    teacher: Teacher | None
    accelerator: Any
    frozen: Callable[[], AbstractContextManager[Any]]
    report: Callable[[dict[str, Any]], None] = field(default=lambda _: None)
    router_figures: dict[str, Any] = field(default_factory=dict)
    started_from: str | None = None
    origin: str = ""
    lengths: list[list[int]] = field(default_factory=list)
    observations: Observations | None = None
    refit: Callable[[int], None] | None = None

    @property
    def folder(self) -> Path:
        return self.settings.out

    def train(self) -> None:
        """Run all steps that are not done yet, starting from the last checkpoint if there is one.

        Raises:
            TrainingError: the loss is not finite, or a checkpoint has other settings or cannot be written.
        """
        settings = self.settings
        optimizers = self._optimizers()
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        start, seconds = self._resume(optimizers, parameters)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        if self.refit is not None and start % settings.refit_steps:  # as it was when the run stopped
            self.refit(start - start % settings.refit_steps)
        for step in range(start, settings.num_steps):
            if self.refit is not None and step % settings.refit_steps == 0:
                self.accelerator.wait_for_everyone()
                self.refit(step)
            began = time.perf_counter()
            for group in groups:
                group["lr"] = group["peak"] * rate_share(step, settings.warmup_steps, settings.num_steps)
            row = self._step(step, parameters)
            norm = float(nn.utils.clip_grad_norm_(parameters, settings.clip))
            if not (math.isfinite(row["loss"]) and math.isfinite(norm)):
                raise TrainingError(
                    f"step {step}: the loss is {row['loss']} and the gradient's norm {norm}; nothing of this step is "
                    "kept. Lower learning_rate, or look at the sequences of this step"
                )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seconds += time.perf_counter() - began
            done = step + 1
            tokens = settings.batch * settings.length
            row |= {"grad_norm": norm, "learning_rate": groups[0]["lr"], "seconds": round(seconds, 2)}
            row["tokens_per_second"] = round(tokens / (time.perf_counter() - began), 1)
            if self.accelerator.is_main_process:
                self._log(row)
                self.report(row)
                if done % settings.save_every == 0 or done == settings.num_steps:
                    save_state(self.folder / CHECKPOINT_FILE, self._state(done, seconds, optimizers, parameters))

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers: of the repair, and of the routing where that is trained. `peak`: the peak of `lr`."""
        settings, decay = self.settings, self.settings.weight_decay
        repair, routing = self.repair.parameters(), self.routing.parameters()
        if settings.optimizer == "muon":
            first: torch.optim.Optimizer = torch.optim.Muon(
                repair, lr=settings.learning_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            )
        else:
            first = torch.optim.AdamW(repair, lr=settings.learning_rate, weight_decay=decay)
        optimizers = [first]
        if routing:
            optimizers.append(torch.optim.AdamW(routing, lr=settings.router_learning_rate, weight_decay=decay))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        return optimizers

    def _step(self, step: int, parameters: list[nn.Parameter]) -> dict[str, Any]:
        """Compute the gradients of one optimizer step, summed over processes; returns the log row."""
        settings = self.settings
        # Seeded with (seed, step) alone, so that a resumed run draws what the stopped one would have drawn.
        rng = np.random.default_rng((settings.seed, step))
        num_layers = self.model.config.num_hidden_layers
        smallest = depth_for_budget(settings.min_budget, num_layers)
        depths = draw_depths(num_layers, smallest, settings.batch, rng, full=not self.repair.exact_at_full_depth)
        # Sorted, because sequences of equal depth share a forward pass if a micro-batch has several sequences.
        depths.sort()
        # Shuffled, so that no source of text always gets the lowest depth.
        indices = rng.permutation(self.corpus.order[step * settings.batch : (step + 1) * settings.batch])
        seeds = rng.integers(1 << 32, size=settings.batch // settings.micro_batch)
        losses = torch.zeros(len(seeds), device=self.accelerator.device)
        for number in range(self.accelerator.process_index, len(seeds), self.accelerator.num_processes):
            rows = slice(number * settings.micro_batch, (number + 1) * settings.micro_batch)
            loss = self._loss(indices[rows], depths[rows], np.random.default_rng(seeds[number]), step, rows)
            backward(self.model, loss / len(seeds))
            losses[number] = loss.detach()
        losses = self.accelerator.reduce(losses, "sum")
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, "sum")
        per_pass = np.array(depths).reshape(len(seeds), -1).mean(axis=1)
        return {
            "step": step,
            "steps": settings.num_steps,
            "tokens": (step + 1) * settings.batch * settings.length,
            "loss": float(losses.mean()),
            "budget": round(float(np.mean(depths)) / num_layers, 4),
            "losses": [[float(d), round(float(v), 6)] for d, v in zip(per_pass, losses)],
        }

    def _loss(
        self, indices: np.ndarray, depths: list[int], rng: np.random.Generator, step: int, rows: slice
    ) -> torch.Tensor:
        """Return the loss of one micro-batch in nats per token. rows: of the batch of this step."""
        device = self.accelerator.device
        token_ids = torch.from_numpy(self.corpus.sequences[indices].astype(np.int64)).to(device)
        routed = self.routing.route(token_ids, depths, rng)
        gates = None if routed.gates is None else routed.gates.to(device)
        hidden = routed_hidden(
            self.model,
            token_ids,
            routed.masks.to(device),
            self.settings.kv_policy,
            self.repair.bypass(),
            gates,
            checkpoint=self.settings.checkpoint_activations,
        )
        hidden, head = self.model.model.norm(hidden), self.model.lm_head
        if self.teacher is None:
            with gathered(head):
                return next_token_loss(hidden, head.weight, token_ids)
        with self.frozen():
            ids, log_p = (part.to(device) for part in self.teacher.top_log_probs(indices))
        divergences = None if routed.choices is None else torch.empty(token_ids.shape, device=device)
        with gathered(head):
            loss = distillation_loss(hidden, head.weight, ids, log_p, divergences)
        if divergences is not None:
            assert self.observations is not None
            assert routed.choices is not None
            first = step * self.settings.batch
            self.observations.add(slice(first + rows.start, first + rows.stop), indices, routed.choices, divergences)
        return loss

    def path_losses(self, indices: np.ndarray, mask: torch.Tensor) -> np.ndarray:
        """Return the KL divergence from the full model of each sequence on one path: [len(indices)], nats per token.

        The tokens that a router decides from (`router_context`) are not scored. mask: [num_layers], the path.
        """
        assert self.teacher is not None
        device, losses = self.accelerator.device, []
        bypass, context = self.repair.bypass(), self.settings.router_context
        for index in indices:
            rows = np.array([index])
            token_ids = torch.from_numpy(self.corpus.sequences[rows].astype(np.int64)).to(device)
            masks = mask.to(device).expand(*token_ids.shape, -1)
            hidden = self.model.model.norm(routed_hidden(self.model, token_ids, masks, self.settings.kv_policy, bypass))
            ids, log_p = (t[:, context:].to(device) for t in self.teacher.top_log_probs(rows))
            with gathered(self.model.lm_head):
                losses.append(float(divergence(hidden[:, context:], self.model.lm_head.weight, ids, log_p)))
        return np.array(losses)

    def _log(self, row: dict[str, Any]) -> None:
        try:
            with (self.folder / LOG_FILE).open("a") as log:
                log.write(json.dumps(row) + "\n")
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.folder / LOG_FILE}: {error}; the last checkpoint is intact"
            ) from None

    def _state(
        self, step: int, seconds: float, optimizers: list[torch.optim.Optimizer], parameters: list[nn.Parameter]
    ) -> dict[str, Any]:
        return {
            "step": step,
            "seconds": seconds,
            "digest": self._digest,
            "lengths": self.lengths,
            "parameters": [parameter.detach() for parameter in parameters],
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }

    @property
    def _digest(self) -> str:
        return f"{self.settings.digest}-{self.corpus.digest}-{self.origin}"

    def _resume(self, optimizers: list[torch.optim.Optimizer], parameters: list[nn.Parameter]) -> tuple[int, float]:
        """Load the checkpoint, if there is one; returns (first step to run, seconds spent so far)."""
        log = self.folder / LOG_FILE
        if not (self.folder / CHECKPOINT_FILE).is_file():
            log.unlink(missing_ok=True)
            self.lengths = [[0, self.settings.tokens]]
            return 0, 0.0
        state = load_state(self.folder / CHECKPOINT_FILE)
        if state["digest"] != self._digest:
            raise TrainingError(
                f"{self.folder} holds a run with other settings, data or weights (step {state['step']}); name "
                "another `out`, or remove the folder to start again"
            )
        self.lengths = [length for length in state["lengths"] if length[0] < state["step"]]
        if self.lengths[-1][1] != self.settings.tokens:
            self.lengths.append([state["step"], self.settings.tokens])
        with torch.no_grad():
            for parameter, saved in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.accelerator.is_main_process and log.is_file():  # steps after the checkpoint are run again
            log.write_text("".join(f"{line}\n" for line in _lines_before(state["step"], log.read_text())))
        return state["step"], state["seconds"]


def _lines_before(step: int, log: str) -> list[str]:
    """The rows of a log that belong to steps before `step`, without a last one that a full disk has cut off."""
    return [line for line in log.split("\n")[:-1] if json.loads(line)["step"] < step]


def rate_share(step: int, warmup_steps: int, num_steps: int) -> float:
    """Return the share of the peak learning rate: linear warm-up, then a cosine down to FINAL_RATE."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2
