"""Describes the measurement of one engine process, and computes what needs no engine: prompts, lengths, windows."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

WARM_STEPS = 8  # vllm_buddy captures the graph of a path at the third step on that path
CHECKED_TOKENS = 8  # tokens decoded for a comparison
# The tokens whose distributions are compared: one from the graphs per layer, one from the graph of the path.
COMPARED = (1, 6)
NO_BYPASS = ", no bypass"
EAGER = ", eager and without kernels"
_LEFT_FREE = 0.01  # share of the KV blocks that stays free: a scheduler that runs out of them preempts
_UNCOUNTED = 4  # further tokens of a request: the first one, and those in flight when the last step has been timed
_PROMPT_TOKENS = (64, 200)  # lengths of prompts whose outputs are compared


@dataclass(frozen=True)
class EngineJob:
    """Which engine to start and what to measure with it.

    name: of the variant, or the beginning of the names if there are several budgets. artifact: a folder; None: stock.
    layers: for each layer, its number in the model whose weights are drawn; None: the model's folder has weights.
    runs: (batch, tokens per prompt). Each is timed `repeats` times, for `steps` steps. options: of vllm.LLM.
    """

    name: str
    model: str
    vocab_size: int
    runs: Sequence[tuple[int, int]]
    steps: int
    repeats: int
    artifact: str | None = None
    layers: Sequence[int] | None = None
    budgets: Sequence[float] = ()
    has_bypass: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        """Return JSON from which EngineJob(**json.loads(...)) makes this job again."""
        return json.dumps(asdict(self))

    def variant(self, budget: float | None) -> str:
        """Return the name of a variant of this engine, without the note about the bypass."""
        return self.name if budget is None else f"{self.name} {budget}"

    @property
    def timed_steps(self) -> int:
        """Steps of a run with all requests decoding. The additional step ends where the first repeat begins."""
        return WARM_STEPS + self.steps * self.repeats + 1


def check_prompts(vocab_size: int, batch: int, longest: int) -> list[list[int]]:
    """Return the prompts whose outputs are compared, equal in every process. The first has `longest` tokens."""
    rng = np.random.default_rng(batch)
    lengths = [longest, *rng.integers(*_PROMPT_TOKENS, batch - 1).tolist()]
    return [draw_tokens(rng, vocab_size, length) for length in lengths]


def draw_tokens(rng: np.random.Generator, vocab_size: int, num_tokens: int) -> list[int]:
    """Draw random token ids, without the beginning of the vocabulary, which holds special tokens."""
    return rng.integers(vocab_size // 10, vocab_size, num_tokens).tolist()


def tokens_per_request(timed_steps: int, batch: int, context: int, tokens_per_step: int) -> int:
    """Return the most tokens that a request decodes: the first ones decode while prompts of others are still read."""
    prefill_steps = math.ceil(batch * context / max(1, tokens_per_step - batch))
    return timed_steps + prefill_steps + _UNCOUNTED


def why_left_out(
    batch: int, context: int, decoded: int, *, max_model_len: int, block_size: int, num_blocks: int
) -> str | None:
    """Return why a run cannot be timed with this KV cache, or None if it can. decoded: tokens per request."""
    tokens = context + decoded
    if tokens > max_model_len:
        return f"{context} + {decoded} tokens are more than the model's {max_model_len} positions"
    blocks, usable = batch * math.ceil(tokens / block_size), int(num_blocks * (1 - _LEFT_FREE))
    if blocks > usable:
        return f"it takes {blocks * block_size} tokens of KV cache, and there are {usable * block_size}"
    return None


def windows(stamps: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return the seconds between stamps and routing's share of them. stamps: (time, total time of routing), seconds."""
    seconds, routing = np.diff(np.array(stamps), axis=0).T
    return seconds.tolist(), (routing / seconds).tolist()
