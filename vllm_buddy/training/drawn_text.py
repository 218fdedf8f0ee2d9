"""Draws training text from the model itself: continued openers, exchanges in its chat template, answers to questions.

With a chat template the model writes both sides of an exchange (as in Magpie, arXiv 2406.08464): it continues an opener
inside the user's turn, and then answers what it wrote. Questions of a file are answered instead where there is one.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_buddy.data_file import DataFile, exchange
from vllm_buddy.errors import DataError

OPENERS = (
    "Question: How do I",
    "Question: How to",
    "Question: What is the best way to",
    "Question: To",
    "To make",
    "To clean",
    "How to",
    "Use a",
    "The",
    "In",
    "A",
    "When",
    "Once upon a time",
    "It was",
    "The history of",
    "Scientists",
)
CHAT_OPENERS = (
    "How do I",
    "What is the best way to",
    "Write a",
    "Explain",
    "Why",
    "Give me",
    "What is",
    "Tell me",
    "List",
    "Can you",
    "I have a",
    "Compare",
    "Is it",
    "Calculate",
    "Translate",
    "Who",
)
_QUESTION_SHARE = 4  # a question takes at most this part of a sample: 1 / 4
_SEEDS = 1_000_003  # distance between the seeds of two runs; samples of a run are numbered


@dataclass(frozen=True)
class Draw:
    """A wanted continuation of `prompt`, token ids, of at most `max_tokens`."""

    prompt: list[int]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Drawn:
    """A continuation: its text without special tokens, and the tokens that it took."""

    text: str
    num_tokens: int


Generate = Callable[[Sequence[Draw]], list[Drawn]]


class DrawnText(ABC):
    """What `vllm-buddy sample` draws from, sample by sample.

    max_tokens: of a sample, at most. most: number of samples that there are; None: any number. `length`, which
    subclasses set: tokens of the longest prompt with its continuation.
    """

    length: int

    def __init__(self, max_tokens: int, most: int | None = None) -> None:
        self._max_tokens, self._most = max_tokens, most

    def rounds(self, tokens: int, batch: int, generate: Generate) -> Iterator[tuple[list[dict[str, str]], int]]:
        """Yield (rows, tokens drawn so far) until `tokens` are drawn or there is no sample left.

        A row is what `vllm-buddy train` reads. At most `max_tokens` - 1 tokens are drawn beyond `tokens`. batch:
        samples of a round.
        """
        done = number = 0
        while done < tokens and number != self._most:
            wanted = min(math.ceil((tokens - done) / self._max_tokens), batch)
            numbers = range(number, number + wanted if self._most is None else min(number + wanted, self._most))
            rows, drawn = self._drawn(numbers, generate)
            done, number = done + drawn, numbers.stop
            yield rows, done

    @abstractmethod
    def _drawn(self, numbers: range, generate: Generate) -> tuple[list[dict[str, str]], int]:
        """Draw the samples of these numbers; returns their rows, and the tokens that were drawn."""


class Sampler(DrawnText):
    """Draws samples of at most `max_tokens` tokens, whose openers take turns.

    tokenizer: of Hugging Face. plain: continue the openers as text even where there is a chat template. openers: None
    for the usual ones. `length`: tokens of the longest prompt with its continuation.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_tokens: int,
        seed: int = 0,
        *,
        plain: bool = False,
        openers: Sequence[str] | None = None,
    ) -> None:
        super().__init__(max_tokens)
        self._tokenizer, self._seed = tokenizer, seed
        self.chat = bool(tokenizer.chat_template) and not plain
        self._openers = openers or (CHAT_OPENERS if self.chat else OPENERS)
        self._opened, longest = [tokenizer(opener).input_ids for opener in self._openers], 0
        if self.chat:
            self._opened = [self._turn(opener, open_end=True) for opener in self._openers]
            longest = max(len(self._turn(opener)) for opener in self._openers)
        self.length = max(longest, *map(len, self._opened)) + max_tokens

    def _drawn(self, numbers: range, generate: Generate) -> tuple[list[dict[str, str]], int]:
        return self._exchanges(numbers, generate) if self.chat else self._continued(numbers, generate)

    def _continued(self, numbers: range, generate: Generate) -> tuple[list[dict[str, str]], int]:
        drawn = generate([self._draw(number, self._max_tokens) for number in numbers])
        rows = [{"text": self._opener(number) + one.text} for number, one in zip(numbers, drawn, strict=True)]
        return rows, sum(one.num_tokens for one in drawn)

    def _exchanges(self, numbers: range, generate: Generate) -> tuple[list[dict[str, str]], int]:
        limit = max(1, self._max_tokens // _QUESTION_SHARE)
        asked = generate([self._draw(number, limit) for number in numbers])
        questions, draws = [], []
        for number, one in zip(numbers, asked, strict=True):
            question = (self._opener(number) + one.text).strip()
            prompt = self._turn(question)
            # Text that is not valid, as of a model that is not trained, may take more tokens when it is read again.
            room = min(self._max_tokens - one.num_tokens, self.length - len(prompt))
            if room > 0:
                questions.append(question)
                draws.append(Draw(prompt, room, self._seed * _SEEDS + number))
        answers = generate(draws) if draws else []
        rows = [{"instruction": q, "output": a.text.strip()} for q, a in zip(questions, answers, strict=True)]
        return rows, sum(one.num_tokens for one in (*asked, *answers))

    def _draw(self, number: int, max_tokens: int) -> Draw:
        return Draw(self._opened[number % len(self._opened)], max_tokens, self._seed * _SEEDS + number)

    def _opener(self, number: int) -> str:
        return self._openers[number % len(self._openers)]

    def _turn(self, content: str, *, open_end: bool = False) -> list[int]:
        """The ids of a user's turn, left open or with the beginning of the answer after it."""
        rendered = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            continue_final_message=open_end,
            add_generation_prompt=not open_end,
        )
        return self._tokenizer(rendered, add_special_tokens=False).input_ids


class Answerer(DrawnText):
    """Draws answers of at most `max_tokens` tokens to the questions of a file, each once, in an order by the seed.

    questions: rows with `instruction`, and perhaps `input`; other rows are left out. share: how much of the file is
    used, from its beginning. tokenizer: of Hugging Face; without a chat template the question alone is the prompt.

    Raises:
        DataError: there is no question in this part of the file.
    """

    def __init__(self, questions: DataFile, share: float, tokenizer: Any, max_tokens: int, seed: int = 0) -> None:
        rows = questions.rows or []
        asked = [row for row in rows[: int(len(rows) * share)] if _is_question(row)]
        if not asked:
            raise DataError(f"{questions.path} has no row with `instruction`, which would be a question to answer")
        self._rows = [asked[index] for index in np.random.default_rng(seed).permutation(len(asked))]
        super().__init__(max_tokens, len(self._rows))
        self._seed = seed
        prompts = [exchange({**row, "output": ""}, tokenizer).prompt for row in self._rows]
        self._prompts = tokenizer(prompts, add_special_tokens=not tokenizer.chat_template).input_ids
        self.length = max(map(len, self._prompts)) + max_tokens

    def _drawn(self, numbers: range, generate: Generate) -> tuple[list[dict[str, str]], int]:
        answers = generate([Draw(self._prompts[i], self._max_tokens, self._seed * _SEEDS + i) for i in numbers])
        rows = [{**_question(self._rows[i]), "output": a.text.strip()} for i, a in zip(numbers, answers, strict=True)]
        return rows, sum(answer.num_tokens for answer in answers)


def _is_question(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("instruction"), str) and isinstance(row.get("input") or "", str)


def _question(row: dict[str, str]) -> dict[str, str]:
    return {key: row[key] for key in ("instruction", "input") if row.get(key)}
