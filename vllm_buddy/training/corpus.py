"""Training text as sequences of token ids, in an order that depends on the seed alone."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch

from vllm_buddy.errors import TrainingError
from vllm_buddy.training.settings import DataSource


@dataclass(frozen=True)
class Corpus:
    """All sequences of all sources, and which of them each training position uses.

    sequences: [num_sequences, length], int32. order: [num_used], indices into them; a source that is used up starts
    again. starts: [num_sources + 1], where the sequences of each source begin. digest: of the sequences.
    """

    sequences: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    digest: str
    sha256: dict[str, str]

    @classmethod
    def read(
        cls, sources: Sequence[DataSource], folder: FilePath | None, tokenizer: Any, length: int, used: int, seed: int
    ) -> "Corpus":
        """Read and tokenize. used: sequences that training will take.

        Raises:
            TrainingError: a file is missing, empty, binary, of another form, or too short for one sequence.
        """
        parts, hashes = [], {}
        rng = np.random.default_rng(seed)
        for source in sources:
            path = source.file if folder is None else folder / source.file
            data = _read_bytes(path)
            hashes[source.file.name] = hashlib.sha256(data).hexdigest()
            ids = _tokenize(path, data, tokenizer)
            ids = ids[: int(len(ids) * source.share)]
            if len(ids) < length:
                raise TrainingError(f"{path} gives {len(ids)} tokens, less than one sequence of {length}")
            parts.append(rng.permutation(ids[: len(ids) // length * length].reshape(-1, length)))
        sequences = np.concatenate(parts)
        starts = np.cumsum([0, *map(len, parts)])
        weights = np.array([source.weight for source in sources])
        # The source that is furthest behind its share is next.
        taken = np.zeros(len(parts), dtype=np.int64)
        order = np.empty(used, dtype=np.int64)
        for position in range(used):
            behind = int(np.argmin((taken + 0.5) / weights))
            order[position] = starts[behind] + taken[behind] % len(parts[behind])
            taken[behind] += 1
        digest = hashlib.sha256(np.ascontiguousarray(sequences).tobytes()).hexdigest()[:16]
        return cls(sequences, order, starts, digest, hashes)

    def take(self, num_tokens: int, source: int | None = None) -> torch.Tensor:
        """About `num_tokens` tokens in whole sequences, in the mixture of training or of one source alone.

        Returns:
            [num_sequences, length], int64.
        """
        count = max(1, num_tokens // self.sequences.shape[1])
        if source is None:
            chosen = list(dict.fromkeys(self.order[: 2 * count].tolist()))[:count]
        else:
            chosen = list(range(self.starts[source], self.starts[source + 1]))[:count]
        return torch.from_numpy(self.sequences[chosen].astype(np.int64))


def _read_bytes(path: FilePath) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrainingError(f"cannot read the training data {path}: {error.strerror or error}") from None
    if not data.strip():
        raise TrainingError(f"the training data {path} is empty")
    if b"\0" in data:
        raise TrainingError(f"{path} holds NUL bytes, so it is not text; give *.txt, *.json or *.jsonl")
    return data


def _tokenize(path: FilePath, data: bytes, tokenizer: Any) -> np.ndarray:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path} is not UTF-8 text (byte {error.start})") from None
    if path.suffix == ".txt":
        return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)
    try:
        if path.suffix == ".json":
            rows = json.loads(text)
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            raise TrainingError(f"{path}: what is in it follows from its ending; known are .txt, .json and .jsonl")
    except json.JSONDecodeError as error:
        raise TrainingError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise TrainingError(f"{path} must hold a list of rows")
    documents = [_document(path, index, row, tokenizer) for index, row in enumerate(rows)]
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return np.array([token for ids in encoded for token in (*ids, *end)], dtype=np.int32)


def _document(path: FilePath, index: int, row: Any, tokenizer: Any) -> str:
    found = row if isinstance(row, dict) else {}
    if isinstance(found.get("text"), str):
        return found["text"]
    if not isinstance(found.get("instruction"), str) or not isinstance(found.get("output"), str):
        raise TrainingError(f"{path}: row {index} has neither `text` nor `instruction` and `output`")
    question = "\n\n".join(part for part in (row["instruction"], row.get("input") or "") if part)
    if not tokenizer.chat_template:
        return f"{question}\n\n{row['output']}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    return tokenizer.apply_chat_template(messages, tokenize=False)
