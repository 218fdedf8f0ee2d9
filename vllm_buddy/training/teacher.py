"""Computes the full model's top logits once per sequence and caches them on disk, for all epochs and runs."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.errors import TrainingError
from vllm_buddy.method.batched import dense_layer, embed
from vllm_buddy.method.sharded import enter_layer, gathered, leave_layer, true_anywhere
from vllm_buddy.training.corpus import Corpus
from vllm_buddy.training.mapped import open_array
from vllm_buddy.training.objective import top_log_probs

BYTES_PER_LOGIT = np.dtype(np.int32).itemsize + np.dtype(np.float16).itemsize


class Teacher:
    """Gives the log p of the `top` likeliest next tokens after every position.

    folder: holds `ids` [num_sequences, length, top] int32, `log_probs` float16 of the same shape, and `known`
    [num_sequences] bool, which sequences are computed. Two runs may fill it at once, because they write the same.

    Raises:
        TrainingError: the disk has no room for the sequences that this run uses.
    """

    def __init__(self, model: nn.Module, corpus: Corpus, top: int, folder: Path) -> None:
        self._model = model
        self._sequences = corpus.sequences
        shape = (*corpus.sequences.shape, top)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._ids = open_array(folder / "ids.npy", np.int32, shape)
            self._log_probs = open_array(folder / "log_probs.npy", np.float16, shape)
            self._known = open_array(folder / "known.npy", np.bool_, shape[:1])
        except OSError as error:
            raise TrainingError(
                f"cannot write the full model's logits to {folder}: {error.strerror or error}"
            ) from None
        num_missing = int((~self._known[np.unique(corpus.order)]).sum())
        _check_room(folder, num_missing * int(np.prod(shape[1:])) * BYTES_PER_LOGIT)

    def top_log_probs(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (token ids int64, log p float32) of the sequences at `indices`, each [batch, length, top]."""
        missing = indices[~self._known[indices]]
        if true_anywhere(self._model, len(missing) > 0):
            missing = missing if len(missing) else indices  # computed again, for processes that need the layers with us
            ids, log_probs = self._compute(torch.from_numpy(self._sequences[missing].astype(np.int64)))
            self._ids[missing], self._log_probs[missing] = ids, log_probs
            self._known[missing] = True
        return torch.from_numpy(self._ids[indices].astype(np.int64)), torch.from_numpy(
            self._log_probs[indices].astype(np.float32)
        )

    @torch.no_grad()
    def _compute(self, token_ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        model: Any = self._model
        hidden, rotary = embed(model, token_ids.to(next(model.parameters()).device))
        for index, layer in enumerate(model.model.layers):
            hidden = dense_layer(layer, enter_layer(model, index, hidden), rotary)
            hidden = leave_layer(model, index, hidden)
        with gathered(model.lm_head):
            ids, log_probs = top_log_probs(model.model.norm(hidden), model.lm_head.weight, self._ids.shape[-1])
        return ids.cpu().numpy(), log_probs.cpu().numpy()


def check_top_logits(top: int, vocab_size: int) -> None:
    """Raise a TrainingError if there are not so many logits."""
    if top > vocab_size:
        raise TrainingError(f"top_logits is {top}, the model has {vocab_size} tokens; lower it")


def _check_room(folder: Path, num_bytes: int) -> None:
    # Writing to a mapped file on a full disk kills the process without a message.
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise TrainingError(
            f"the full model's logits need {num_bytes >> 20} MiB in {folder}, {free >> 20} MiB are free; name another "
            "cache_dir or lower top_logits"
        )
