"""Decoding with drafts, walked through over a text that the model wrote: steps, passes and checked drafts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Drafts:
    """Drafts over what the model wrote.

    said: [num_texts, length], what the whole model says after each token. tokens: the same shape, passages included.
    start: position of the last token of each passage, the first whose next token the model wrote.
    chains: by depth, [max_drafts, num_texts, length], see draft_chains. stages: by number of stages, what the exits of
        all stages but the last say, [stages - 1, num_texts, length].
    untrained: by depth of an exit of the artifact, chains as above: among all tokens, of its path with the bypass of
        each layer alone and, where there is one, of the library's path of that depth with the same.
    """

    tokens: torch.Tensor
    said: torch.Tensor
    start: int
    chains: dict[int, torch.Tensor]
    stages: dict[int, torch.Tensor]
    untrained: dict[int, list[torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Walk:
    """What decoding with drafts takes. tokens: written. steps: of the whole model. passes: of the draft path. checked:
    drafts that steps checked."""

    tokens: int
    steps: int
    passes: int
    checked: int

    def speedup(self, pass_cost: float, row_cost: float) -> float:
        """Tokens per cost, where one token costs 1 without drafts."""
        return self.tokens / (self.steps + self.passes * pass_cost + self.checked * row_cost)


def walk(drafts: Drafts, ngrams: Sequence[Sequence[Sequence[int]]] | None, depth: int | None, num_drafts: int) -> Walk:
    """Write the texts again with drafts.

    ngrams: drafts of n-grams at each position of each text, used where there are any. depth: of num_drafts drafts at
    the other positions; None: there are none.
    """
    chains = [] if depth is None else drafts.chains[depth].tolist()
    tokens = steps = passes = checked = 0
    for number, text in enumerate(drafts.tokens.tolist()):
        position, end = drafts.start, len(text) - 1
        while position < end:
            left = end - position - 1
            made = [] if ngrams is None else list(ngrams[number][position][:left])
            if not made and depth is not None:
                made = [chains[i][number][position + i] for i in range(min(num_drafts, left))]
                passes += len(made)
            steps += 1
            checked += len(made)
            accepted = _agreed(made, text[position + 1 :])
            position += accepted + 1
            tokens += accepted + 1
    return Walk(tokens, steps, passes, checked)


def _agreed(drafted: Sequence[int], text: Sequence[int]) -> int:
    pairs = enumerate(zip(drafted, text))
    return next((i for i, (draft, token) in pairs if draft != token), len(drafted))


def ngram_drafts(token_ids: Sequence[int], shortest: int, longest: int, num_drafts: int) -> list[int]:
    """Up to num_drafts tokens after an earlier place of the longest n-gram that ends the text; none without one."""
    for n in range(min(longest, len(token_ids) - 1), shortest - 1, -1):
        end = list(token_ids[-n:])
        for start in range(len(token_ids) - n):
            if list(token_ids[start : start + n]) == end:
                return list(token_ids[start + n : start + n + num_drafts])
    return []
