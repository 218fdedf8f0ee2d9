"""Tests of the packed forward against the reference."""

import numpy as np
import pytest
import torch

from tests.harness.tiny_models import FAMILIES, HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE, load_model, save_tiny_model
from vllm_buddy.method import path_of
from vllm_buddy.method.batched import routed_hidden
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.kv_policy import KV_POLICIES
from vllm_buddy.method.reference import routed_logits

# Float32 matrix products of other shapes: the same sums in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
LENGTH = 19


def random_masks(rng: np.random.Generator, batch: int) -> torch.Tensor:
    masks = rng.random((batch, LENGTH, NUM_LAYERS)) < 0.6
    masks[..., [0, -1]] = True
    return torch.from_numpy(masks)


def random_bypass(seed: int = 3, rank: int = 4) -> Bypass:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(NUM_LAYERS - 2, rank, HIDDEN_SIZE, generator=generator) * 0.1
    return Bypass(down, torch.randn(NUM_LAYERS - 2, HIDDEN_SIZE, rank, generator=generator) * 0.1, 1e-6)


def logits(model, token_ids, masks, policy, bypass):
    hidden = routed_hidden(model, token_ids, masks, policy, bypass)
    return model.lm_head(model.model.norm(hidden))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("batched")
    return {family: load_model(save_tiny_model(root / family, family)) for family in FAMILIES}


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_bypass", [False, True])
def test_equals_the_reference(models, family, policy, with_bypass) -> None:
    """Fails if training and evaluation compute other values than the reference, with which serving agrees."""
    model, rng = models[family], np.random.default_rng(0)
    bypass = random_bypass() if with_bypass else None
    token_ids = torch.from_numpy(rng.integers(VOCAB_SIZE, size=(5, LENGTH)))
    masks = random_masks(rng, 5)
    masks[0, :, 3] = True  # one sequence runs layer 3 with all tokens
    masks[1, :, 3] = False  # and another one skips it
    masks[:, :, 4] = False  # no token runs layer 4
    masks[2] = True
    with torch.no_grad():
        found = logits(model, token_ids, masks, policy, bypass)
    for row in range(5):
        paths = [path_of(np.flatnonzero(mask).tolist()) for mask in masks[row].numpy()]
        expected = routed_logits(model, token_ids[row].tolist(), paths, policy, bypass=bypass)
        torch.testing.assert_close(found[row], expected, **TOLERANCE)


@pytest.mark.parametrize("whole", [False, True], ids=["rows", "sequences"])
def test_one_path_per_sequence_takes_the_same_values(models, whole) -> None:
    """Fails if the shortcut for sequences that run a layer with all tokens or none computes other values."""
    model, rng = models["llama"], np.random.default_rng(1)
    token_ids = torch.from_numpy(rng.integers(VOCAB_SIZE, size=(4, LENGTH)))
    masks = random_masks(rng, 4)[:, :1].expand(-1, LENGTH, -1).clone()
    if not whole:
        # A last token with another path, which the others cannot see, rules out the shortcut.
        token_ids = torch.cat([token_ids, token_ids[:, :1]], dim=1)
        masks = torch.cat([masks, ~masks[:, :1]], dim=1)
        masks[..., [0, -1]] = True
    with torch.no_grad():
        found = logits(model, token_ids, masks, "masked", random_bypass())[:, :LENGTH]
    for row in range(4):
        paths = [path_of(np.flatnonzero(mask).tolist()) for mask in masks[row, :LENGTH].numpy()]
        expected = routed_logits(model, token_ids[row, :LENGTH].tolist(), paths, "masked", bypass=random_bypass())
        torch.testing.assert_close(found[row], expected, **TOLERANCE)


@pytest.mark.parametrize("with_bypass", [False, True])
def test_gates_change_no_value_and_get_the_gradient_of_the_mask(models, with_bypass) -> None:
    """Fails if gates change the forward, or their gradient differs from the finite difference."""
    model, rng = models["llama"], np.random.default_rng(2)
    bypass = random_bypass() if with_bypass else None
    token_ids = torch.from_numpy(rng.integers(VOCAB_SIZE, size=(3, LENGTH)))
    masks = random_masks(rng, 3)[:, :1].expand(-1, LENGTH, -1)
    gates = masks[:, 0].float().requires_grad_()
    hidden = routed_hidden(model, token_ids, masks, "masked", bypass, gates)
    torch.testing.assert_close(hidden, routed_hidden(model, token_ids, masks, "masked", bypass), **TOLERANCE)
    # The last candidate layer is followed by the last layer only, so its gate moves the output by a known difference.
    last = NUM_LAYERS - 2
    probe = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    (hidden * probe).sum().backward()
    step = 1e-3
    with torch.no_grad():
        for row in range(3):
            moved = gates.detach().clone()
            moved[row, last] += step
            up = (routed_hidden(model, token_ids, masks, "masked", bypass, moved) * probe).sum()
            moved[row, last] -= 2 * step
            down = (routed_hidden(model, token_ids, masks, "masked", bypass, moved) * probe).sum()
            torch.testing.assert_close(gates.grad[row, last], (up - down) / (2 * step), rtol=0.02, atol=0.02)


def test_gates_refuse_a_path_that_changes(models) -> None:
    """Fails if gates, one per sequence and layer, are accepted for a sequence whose tokens have several paths."""
    masks = torch.ones(1, LENGTH, NUM_LAYERS, dtype=torch.bool)
    masks[0, 5:, 3] = False
    token_ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    with pytest.raises(ValueError, match="one path per sequence"):
        routed_hidden(models["llama"], token_ids, masks, gates=torch.ones(1, NUM_LAYERS))
