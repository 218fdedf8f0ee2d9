"""Draws samples that look like requests: a prompt to decide from, and an answer to score."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_buddy.data_file import DataFile
from vllm_buddy.errors import DataError
from vllm_buddy.evaluation.sample import Sample


@dataclass(frozen=True)
class SampleShape:
    """The lengths of samples, in tokens.

    context: length of the context of running text, which has no prompt.
    prompt: largest length of a prompt; rows with a longer one are left out.
    answer: largest number of scored tokens; longer answers are cut.
    shortest_answer: rows with a shorter answer are left out.
    """

    context: int = 64
    prompt: int = 192
    answer: int = 128
    shortest_answer: int = 8


def request_samples(
    file: DataFile, tokenizer: Any, part: tuple[float, float], count: int, shape: SampleShape, seed: int
) -> list[Sample]:
    """Draw `count` samples from a part of a file.

    In *.txt files and in rows with `text`, the first tokens are the context. In other rows the prompt is the context,
    and the answer with its end-of-turn token is scored.

    part: start and end of the part, as shares of the file's tokens or rows.

    Raises:
        DataError: the part has fewer than `count` samples.
    """
    rng = np.random.default_rng(seed)
    if file.rows is None:
        samples = _windows(file, tokenizer, part, shape)
        samples = [samples[i] for i in rng.permutation(len(samples))[:count]]
    else:
        first, last = (int(share * len(file.rows)) for share in part)
        samples = []
        for index in rng.permutation(np.arange(first, last)):
            sample = _row_sample(file, int(index), tokenizer, shape)
            if sample is not None:
                samples.append(sample)
            if len(samples) == count:
                break
    if len(samples) < count:
        raise DataError(
            f"{file.path}: {count} samples were asked for, but from {part[0]:.0%} to {part[1]:.0%} of it there are "
            f"{len(samples)} of the lengths wanted ({shape}); ask for fewer"
        )
    return samples


def _windows(file: DataFile, tokenizer: Any, part: tuple[float, float], shape: SampleShape) -> list[Sample]:
    ids = _encode(tokenizer, file.text)
    ids = ids[int(part[0] * len(ids)) : int(part[1] * len(ids))]
    length = shape.context + shape.answer
    starts = range(0, len(ids) - length + 1, length)
    return [Sample(ids[start : start + length], shape.context) for start in starts]


def _row_sample(file: DataFile, index: int, tokenizer: Any, shape: SampleShape) -> Sample | None:
    text = file.plain(index)
    if text is not None:
        ids = _encode(tokenizer, text)
        context, answer, longest = ids[: shape.context], ids[shape.context :], shape.context
    else:
        exchange = file.exchange(index, tokenizer)
        context, answer = _encode(tokenizer, exchange.prompt), _encode(tokenizer, exchange.answer)
        longest = shape.prompt
        if tokenizer.eos_token_id is not None:
            answer = [*answer, tokenizer.eos_token_id]
    if not 0 < len(context) <= longest or len(answer) < shape.shortest_answer:
        return None
    return Sample([*context, *answer[: shape.answer]], len(context))


def _encode(tokenizer: Any, text: str | None) -> Sequence[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
