"""Checks that generated tokens are the greedy choices of the model, for systems that return only tokens.

Equal tokens cannot be required. In bf16 the two likeliest tokens are often almost equal, a batch of another shape
rounds differently, and after one such difference two correct loops write different texts. So each token is judged by
itself: a plain forward in float32, on the layers that the loop says it ran, reads prompt and answer. The token must be
the likeliest at its place, or less likely by no more than rounding explains. A draft that was kept against the model's
choice, an additional layer or a stale cache entry makes a much larger difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.rounds import Refused

# Largest distance to the likeliest token, in nats. Observed with SmolLM2-135M: 0.0 in float32 for all loops, 0.2 in
# bf16 for the whole model. Half the layers without repair are so uncertain that rounding causes up to 6, so these are
# judged in float32 only. Worst of an answer: 0.5 to 12.6 if drafts are kept unverified, 1.9 to 6.5 without layer 20.
FLOAT32_GAP = 0.001
BFLOAT16_GAP = 0.5


@dataclass(frozen=True)
class LayersRun:
    """Which layers a loop leaves out. skipped: layers, from 0. in_prompt: for prompt tokens too, or the answer only."""

    skipped: frozenset[int] = frozenset()
    in_prompt: bool = True


class GreedyCheck:
    """A plain forward over a Hugging Face model, which is converted to float32."""

    def __init__(self, model: Any) -> None:
        self._model = model.float().eval()
        self._known: dict[Any, torch.Tensor] = {}

    @classmethod
    def load(cls, model_dir: Path) -> "GreedyCheck":
        """Load the model with the bf16 values that all loops have."""
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, local_files_only=True))

    def check(
        self, name: str, prompts: Sequence[list[int]], answers: Sequence[list[int]], run: LayersRun, max_gap: float
    ) -> None:
        """Raise Refused if a token of an answer is further from the greedy choice than `max_gap` nats."""
        for prompt, answer in zip(prompts, answers, strict=True):
            gaps = self.gaps(prompt, answer, run)
            if not float(gaps.max()) <= max_gap:
                at = int(gaps.argmax())
                raise Refused(
                    f"'{name}' does not decode greedily: token {at} of an answer is {float(gaps[at]):.2f} nats behind "
                    f"the likeliest, where rounding explains {max_gap}; nothing is timed"
                )

    @torch.no_grad()
    def gaps(self, prompt: list[int], answer: list[int], run: LayersRun) -> torch.Tensor:
        """Return [len(answer)] the distance in nats of each token to the likeliest one at its place."""
        key = (tuple(prompt), tuple(answer), run)
        if key not in self._known:
            logits = self.logits([*prompt, *answer[:-1]], run, 0 if run.in_prompt else len(prompt))[len(prompt) - 1 :]
            self._known[key] = logits.max(dim=-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        return self._known[key]

    @torch.no_grad()
    def logits(self, token_ids: list[int], run: LayersRun, first_skipping: int) -> torch.Tensor:
        """Return [len(token_ids), vocab_size]. first_skipping: first position that skips the layers `run.skipped`."""

        def pass_unchanged(_layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return torch.cat([output[:, :first_skipping], inputs[0][:, first_skipping:]], dim=1)

        layers = self._model.model.layers
        hooks = [layers[index].register_forward_hook(pass_unchanged) for index in run.skipped]
        try:
            return self._model(torch.tensor([token_ids]), use_cache=False).logits[0]
        finally:
            for hook in hooks:
                hook.remove()


def num_agreed(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Return the number of tokens before the first difference."""
    same = [a == b for a, b in zip(tokens, others)]
    return same.index(False) if False in same else len(same)
