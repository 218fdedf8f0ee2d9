"""Draws training text from the model itself: continued openers, or exchanges in the model's chat template.

With a chat template the model writes both sides of an exchange (as in Magpie, arXiv 2406.08464): it continues an opener
inside the user's turn, and then answers what it wrote.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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


class Sampler:
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
        self._tokenizer, self._max_tokens, self._seed = tokenizer, max_tokens, seed
        self.chat = bool(tokenizer.chat_template) and not plain
        self._openers = openers or (CHAT_OPENERS if self.chat else OPENERS)
        self._opened, longest = [tokenizer(opener).input_ids for opener in self._openers], 0
        if self.chat:
            self._opened = [self._turn(opener, open_end=True) for opener in self._openers]
            longest = max(len(self._turn(opener)) for opener in self._openers)
        self.length = max(longest, *map(len, self._opened)) + max_tokens

    def rounds(self, tokens: int, batch: int, generate: Generate) -> Iterator[tuple[list[dict[str, str]], int]]:
        """Yield (rows, tokens drawn so far) until `tokens` are drawn; a row is what `vllm-buddy train` reads.

        At most `max_tokens` - 1 tokens are drawn beyond `tokens`. batch: samples of a round.
        """
        done = number = 0
        while done < tokens:
            numbers = range(number, number + min(math.ceil((tokens - done) / self._max_tokens), batch))
            rows, drawn = (self._exchanges if self.chat else self._continued)(numbers, generate)
            done, number = done + drawn, numbers.stop
            yield rows, done

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
