"""Makes routers with random scores, without a model."""

from collections.abc import Mapping, Sequence

import numpy as np

from vllm_buddy.method import FoldedDecision, LayerPath, Router

NUM_LAYERS = 10
VOCAB_SIZE = 64
WIDTH = 6


def random_decision(seed: int = 0) -> FoldedDecision:
    """Return a decision whose scores change with every token: the newest token weighs as much as the mean."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    num_middle = NUM_LAYERS - 2
    return FoldedDecision(
        table_context=3 * draw(VOCAB_SIZE, WIDTH),
        table_newest=draw(VOCAB_SIZE, WIDTH),
        b1=draw(WIDTH),
        w2=draw(num_middle, WIDTH),
        b2=draw(num_middle),
    )


def random_router(seed: int = 0, library: Mapping[int, Sequence[LayerPath]] | None = None) -> Router:
    prior = np.random.default_rng(seed + 1).standard_normal(NUM_LAYERS - 2)
    return Router(NUM_LAYERS, prior, random_decision(seed), library=library)
