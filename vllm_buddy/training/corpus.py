"""Reads training text as sequences of token ids; their order depends on the seed alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_buddy.data_file import DataFile
from vllm_buddy.errors import TrainingError
from vllm_buddy.training.hub_rows import documents
from vllm_buddy.training.sources import DatasetSource, Source

ROWS_AT_ONCE = 256  # of a data set, that are read and tokenized together


@dataclass(frozen=True)
class Corpus:
    """The sequences of all sources, and the order in which training uses them.

    sequences: [num_sequences, length], int32.
    order: [num_used], indices into `sequences`. A source that is used up starts again from its beginning.
    starts: [num_sources + 1], index of the first sequence of each source.
    digest: hash of `sequences`. sha256: hash of each file, or of the token ids of a data set, by its name.
    """

    sequences: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    digest: str
    sha256: dict[str, str]

    @classmethod
    def read(
        cls, sources: Sequence[Source], folder: Path | None, tokenizer: Any, length: int, used: int, seed: int
    ) -> "Corpus":
        """Read and tokenize the sources, cut them into sequences and fix the order of training.

        used: number of sequences that training takes.

        Raises:
            DataError: a file or a data set is missing, empty, binary or in another format.
            TrainingError: a source is too short for one sequence.
        """
        parts, hashes = [], {}
        rng = np.random.default_rng(seed)
        for source in sources:
            ids, hashes[source.name] = _token_ids(source, folder, tokenizer)
            if len(ids) < length:
                raise TrainingError(f"{source.name} gives {len(ids)} tokens, less than one sequence of {length}")
            parts.append(rng.permutation(ids[: len(ids) // length * length].reshape(-1, length)))
        sequences = np.concatenate(parts)
        starts = np.cumsum([0, *map(len, parts)])
        weights = np.array([source.weight for source in sources])
        # The next sequence comes from the source that is furthest below its share.
        taken = np.zeros(len(parts), dtype=np.int64)
        order = np.empty(used, dtype=np.int64)
        for position in range(used):
            behind = int(np.argmin((taken + 0.5) / weights))
            order[position] = starts[behind] + taken[behind] % len(parts[behind])
            taken[behind] += 1
        digest = hashlib.sha256(np.ascontiguousarray(sequences).tobytes()).hexdigest()[:16]
        return cls(sequences, order, starts, digest, hashes)

    def counts(self, weights: Sequence[float], vocab_size: int, held_out: np.ndarray) -> np.ndarray:
        """Return how frequent each token is where source i makes up the part weights[i] of the text: [vocab_size].

        held_out: indices of sequences that are left out.
        """
        counts, kept = np.zeros(vocab_size), np.ones(len(self.sequences), dtype=bool)
        kept[held_out] = False
        for weight, start, end in zip(weights, self.starts[:-1], self.starts[1:], strict=True):
            tokens = self.sequences[start:end][kept[start:end]].ravel()
            counts += weight * np.bincount(tokens, minlength=vocab_size) / max(1, len(tokens))
        return counts

    def take(self, num_tokens: int, source: int | None = None) -> torch.Tensor:
        """Return about `num_tokens` tokens as whole sequences, mixed as in training or from one source alone.

        Returns:
            [num_sequences, length], int64.
        """
        count = max(1, num_tokens // self.sequences.shape[1])
        if source is None:
            chosen = list(dict.fromkeys(self.order[: 2 * count].tolist()))[:count]
        else:
            chosen = list(range(self.starts[source], self.starts[source + 1]))[:count]
        return torch.from_numpy(self.sequences[chosen].astype(np.int64))


def _token_ids(source: Source, folder: Path | None, tokenizer: Any) -> tuple[np.ndarray, str]:
    """Return the token ids of the part of a source that is used, int32, and the hash that run.yaml records."""
    if isinstance(source, DatasetSource):
        ids = _dataset_ids(source, folder, tokenizer)
        return ids, hashlib.sha256(ids.tobytes()).hexdigest()
    file = DataFile.read(source.file if folder is None else folder / source.file)
    if file.rows is None:
        ids = np.array(tokenizer(file.text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)
        return ids[: int(len(ids) * source.share)], file.sha256
    # All rows are looked at, so that a damaged one is found. They are cut as request_samples and Answerer cut them.
    plain = [file.plain(index) for index in range(len(file.rows))][: int(len(file.rows) * source.share)]
    texts = [file.exchange(i, tokenizer).whole if text is None else text for i, text in enumerate(plain)]
    return _encoded(texts, tokenizer), file.sha256


def _dataset_ids(source: DatasetSource, folder: Path | None, tokenizer: Any) -> np.ndarray:
    """Read rows until there are `source.tokens` tokens; of a stream no more than that is read."""
    rows = documents(source, folder, tokenizer)
    parts, count = [np.empty(0, dtype=np.int32)], 0
    while (source.tokens is None or count < source.tokens) and (batch := list(islice(rows, ROWS_AT_ONCE))):
        parts.append(_encoded(batch, tokenizer))
        count += len(parts[-1])
    return np.concatenate(parts)[: source.tokens]


def _encoded(texts: list[str], tokenizer: Any) -> np.ndarray:
    """The token ids of documents, each with an end-of-text token after it if the model has one."""
    if not texts:
        return np.empty(0, dtype=np.int32)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return np.array([token for ids in encoded for token in (*ids, *end)], dtype=np.int32)
