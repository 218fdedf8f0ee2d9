"""Tests of running one sequence along many paths at once, against one path at a time."""

import numpy as np
import pytest
import torch

from tests.harness.tiny_models import NUM_LAYERS, VOCAB_SIZE
from tests.method.conftest import Tiny
from tests.method.test_batched import TOLERANCE, random_bypass
from vllm_buddy.method import full_path
from vllm_buddy.method.batched import routed_hidden
from vllm_buddy.method.forked import forked_hidden
from vllm_buddy.method.path import path_mask

ENDS = 1 | 1 << NUM_LAYERS - 1


@pytest.mark.parametrize("with_bypass", [False, True])
def test_every_path_gives_what_it_gives_alone(tiny: Tiny, with_bypass: bool) -> None:
    """Fails if paths share a state beyond their common beginning, or use that of another path: rewards are wrong."""
    rng = np.random.default_rng(0)
    middle = rng.integers(0, 1 << NUM_LAYERS - 2, 9).tolist()
    paths = [full_path(NUM_LAYERS), ENDS, *(ENDS | m << 1 for m in middle)]
    paths.append(paths[3])
    token_ids = torch.from_numpy(rng.integers(0, VOCAB_SIZE, 19))
    bypass = random_bypass() if with_bypass else None
    with torch.no_grad():
        forked = forked_hidden(tiny.model, token_ids, paths, bypass)
        for path, hidden in zip(paths, forked, strict=True):
            masks = torch.from_numpy(path_mask(path, NUM_LAYERS).copy()).expand(1, len(token_ids), -1)
            alone = routed_hidden(tiny.model, token_ids[None], masks, bypass=bypass)[0]
            torch.testing.assert_close(hidden, alone, **TOLERANCE)
    assert not torch.allclose(forked[0], forked[1], **TOLERANCE)


@pytest.mark.parametrize("path", [ENDS ^ 1, 0b11, ENDS | 1 << NUM_LAYERS])
def test_a_path_without_its_ends_or_beyond_the_model_is_refused(tiny: Tiny, path: int) -> None:
    """Fails if such a path is accepted and computed as if it were another path."""
    with pytest.raises(ValueError, match="must hold layers 0 and"):
        forked_hidden(tiny.model, torch.arange(4), [path])
