"""Scores samples with the routed forward of a Hugging Face model, in batches of samples of similar length.

The unrouted model runs once per batch and serves all policies and budgets that are compared with it.
"""

import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.evaluation.engine import Report, Scores, Task, Variant
from vllm_buddy.evaluation.policy import Policy
from vllm_buddy.evaluation.sample import Sample
from vllm_buddy.method import Run, full_path
from vllm_buddy.method.batched import routed_hidden
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.path import path_mask

# Tokens of one forward pass. It limits the memory of the log-probabilities for KL, 4 bytes * vocabulary for each.
BATCH_TOKENS = 2048
_CHUNK_TOKENS = 256  # tokens whose logits are computed at a time


class HfEngine:
    """An engine over a Hugging Face model.

    model: a causal language model in the dtype to compute in. It is not changed.
    batch_tokens: most tokens of one forward pass, unless a sample has more.
    """

    def __init__(self, model: nn.Module, kv_policy: str, batch_tokens: int = BATCH_TOKENS) -> None:
        self._model: Any = model
        self._kv_policy = kv_policy
        self._batch_tokens = batch_tokens
        self._device = next(model.parameters()).device
        self._changed: dict[str, Any] = {}

    @torch.no_grad()
    def score(self, tasks: Sequence[Task], variants: Sequence[Variant], report: Report) -> list[list[Scores]]:
        """See Engine.score."""
        return [self._score_task(task, variants, report) for task in tasks]

    def _score_task(self, task: Task, variants: Sequence[Variant], report: Report) -> list[Scores]:
        found: list[list[Scores]] = [[] for _ in variants]
        order: list[int] = []
        for indices in _batches(task.samples, self._batch_tokens):
            batch = [task.samples[i] for i in indices]
            dense = self._dense_log_probabilities(batch) if task.compare else None
            # At full depth no layer is skipped, so policies with the same weights have the same scores.
            shared: dict[tuple[str, int], Scores] = {}
            for variant, parts in zip(variants, found):
                full = variant.depth == variant.policy.router.num_layers
                key = (_weights_of(variant.policy) if full else f"policy {variant.policy.name}", variant.depth)
                if key not in shared:
                    shared[key] = self._score_batch(batch, variant, dense)
                parts.append(shared[key])
            order += indices
            report(task.name, len(order), len(task.samples))
        return [_in_order(parts, order) for parts in found]

    def _dense_log_probabilities(self, batch: Sequence[Sample]) -> torch.Tensor:
        """Return log-probabilities of the unrouted base model: [num_targets, vocab_size], float32."""
        num_layers = len(self._model.model.layers)
        full = [[Run(len(sample.inputs), full_path(num_layers))] for sample in batch]
        hidden = self._hidden(self._model, batch, full, None)
        return torch.cat([_log_probabilities(self._model, part) for part in hidden.split(_CHUNK_TOKENS)])

    def _score_batch(self, batch: Sequence[Sample], variant: Variant, dense: torch.Tensor | None) -> Scores:
        """Score one batch. dense: from _dense_log_probabilities; None if nothing is compared."""
        policy = variant.policy
        model = self._model_of(policy)
        routes = [policy.route(sample, variant.depth) for sample in batch]
        hidden = self._hidden(model, batch, routes, policy.artifact.bypass)
        targets = torch.tensor([t for sample in batch for t in sample.targets], device=self._device)
        logprobs, greedy, kl = [], [], []
        for start in range(0, len(hidden), _CHUNK_TOKENS):
            chunk = slice(start, start + _CHUNK_TOKENS)
            log_q = _log_probabilities(model, hidden[chunk])
            logprobs.append(log_q.gather(1, targets[chunk, None])[:, 0])
            greedy.append(log_q.argmax(dim=1))
            if dense is not None:
                log_p = dense[chunk]
                kl.append((log_p.exp() * (log_p - log_q)).sum(dim=1))
        sizes = [len(sample.targets) for sample in batch]
        return Scores(_split(logprobs, sizes), _split(greedy, sizes), _split(kl, sizes) if kl else None)

    def _hidden(
        self, model: Any, batch: Sequence[Sample], routes: Sequence[Sequence[Run]], bypass: Bypass | None
    ) -> torch.Tensor:
        """Return the hidden states that predict the targets: [num_targets, hidden_size], before the norm, by sample."""
        length = max(len(sample.inputs) for sample in batch)
        token_ids = torch.zeros(len(batch), length, dtype=torch.int64)
        for row, sample in zip(token_ids, batch):
            row[: len(sample.inputs)] = torch.tensor(list(sample.inputs))
        masks = path_masks(routes, length, len(model.model.layers))
        hidden = routed_hidden(model, token_ids.to(self._device), masks.to(self._device), self._kv_policy, bypass)
        return torch.cat([h[s.num_context - 1 : len(s.inputs)] for h, s in zip(hidden, batch)])

    def _model_of(self, policy: Policy) -> Any:
        """Return the model, with the LoRA of the policy's artifact merged if it has one."""
        lora = policy.artifact.lora
        if lora is None:
            return self._model
        key = _weights_of(policy)
        if key not in self._changed:
            self._changed[key] = copy.deepcopy(self._model)
            lora.merge_into(self._changed[key])
        return self._changed[key]


def path_masks(routes: Sequence[Sequence[Run]], length: int, num_layers: int) -> torch.Tensor:
    """Return which token runs which layer: [len(routes), length, num_layers], bool. Padding runs the last path."""
    masks = np.empty((len(routes), length, num_layers), dtype=bool)
    for mask, route in zip(masks, routes):
        start = 0
        for run in route:
            mask[start:] = path_mask(run.path, num_layers)
            start += run.num_tokens
    return torch.from_numpy(masks)


def _batches(samples: Sequence[Sample], batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of samples, longest first, in batches of at most `batch_tokens` with padding."""
    longest_first = sorted(range(len(samples)), key=lambda i: (-len(samples[i].inputs), i))
    while longest_first:
        size = max(1, batch_tokens // len(samples[longest_first[0]].inputs))
        yield longest_first[:size]
        del longest_first[:size]


def _log_probabilities(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities, [n, vocab_size], float32. hidden: [n, hidden_size], before the final norm."""
    return model.lm_head(model.model.norm(hidden)).float().log_softmax(dim=-1)


def _weights_of(policy: Policy) -> str:
    """Return a key of the weights that a policy runs when no layer is skipped; equal for equal weights."""
    return "base" if policy.artifact.lora is None else f"weights {policy.artifact.digest}"


def _split(chunks: list[torch.Tensor], sizes: Sequence[int]) -> list[np.ndarray]:
    return [part.numpy() for part in torch.cat(chunks).cpu().split(list(sizes))]


def _in_order(parts: Sequence[Scores], order: Sequence[int]) -> Scores:
    """Put scores into the order of the samples. parts: scores of the samples in `order`, batch by batch."""

    def ordered(arrays: Iterator[np.ndarray]) -> list[np.ndarray]:
        by_index = dict(zip(order, arrays, strict=True))
        return [by_index[i] for i in range(len(order))]

    kl = [part.kl for part in parts if part.kl is not None]
    return Scores(
        ordered(chain.from_iterable(part.logprobs for part in parts)),
        ordered(chain.from_iterable(part.greedy for part in parts)),
        ordered(chain.from_iterable(kl)) if kl else None,
    )
