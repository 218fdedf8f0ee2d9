"""A drafter for tests: it knows what the target will say, and gets as many tokens of it wrong as a test asks for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NUM_DRAFTS = 4
CONFIG = {
    "method": "custom_class",
    "model": "tests.harness.oracle_drafter.OracleDrafter",
    "num_speculative_tokens": NUM_DRAFTS,
}


class OracleDrafter:
    """Drafts the known answer to each prompt, right with probability `accuracy` per token.

    answers: whole sequences, prompt first, by prompt. Set by the test; unknown prompts get no drafts.
    """

    answers: Mapping[tuple[int, ...], Sequence[int]] = {}
    accuracy = 0.7
    rng = np.random.default_rng(0)

    def __init__(self, vllm_config: Any) -> None:
        self._vocab_size = vllm_config.model_config.get_vocab_size()

    def load_model(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing to load."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        **_kwargs: Any,
    ) -> list[list[int]]:
        """Up to NUM_DRAFTS tokens after what each request has."""
        return [
            self._drafts(tuple(token_ids_cpu[row, : num_tokens_no_spec[row]].tolist())) if sampled else []
            for row, sampled in enumerate(sampled_token_ids)
        ]

    def _drafts(self, known: tuple[int, ...]) -> list[int]:
        for answer in self.answers.values():
            if tuple(answer[: len(known)]) == known:
                # Not the last token, which is sampled after the last that is computed.
                right = list(answer[len(known) : -1])[: self.rng.integers(NUM_DRAFTS + 1)]
                wrong = self.rng.random(len(right)) > self.accuracy
                return [self._other(token) if w else token for token, w in zip(right, wrong)]
        return []

    def _other(self, token: int) -> int:
        return int((token + self.rng.integers(1, self._vocab_size)) % self._vocab_size)
