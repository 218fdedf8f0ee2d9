"""A model whose weights are gathered layer by layer computes what a whole one does, in the same order for any path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.harness.split_weights import SplitModel
from tests.harness.tiny_models import NUM_LAYERS, VOCAB_SIZE, load_model, save_tiny_model
from tests.method.test_batched import LENGTH, random_bypass
from vllm_buddy.method import full_path, path_of
from vllm_buddy.method.batched import routed_hidden
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.decision import value_table
from vllm_buddy.method.forked import forked_hidden
from vllm_buddy.method.sharded import backward, gathered
from vllm_buddy.training.objective import next_token_loss
from vllm_buddy.training.path_search import removal_order, single_divergences
from vllm_buddy.training.regression import fit_bypass

AT_ONCE = 2  # a layer, and the one that is on its way
PATHS = {
    "layer 2 and 3 skipped": [0, 1, 4, 5, 6, 7],
    "layer 5 skipped": [0, 1, 2, 3, 4, 6, 7],
    "most skipped": [0, 3, 7],
}
UP = [f"layer {index}" for index in range(NUM_LAYERS)]
DOWN = UP[:0:-1]  # to layer 1: the embedding needs no gradient


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("sharded"), "qwen2")


@pytest.fixture
def model(folder: Path) -> nn.Module:
    return load_model(folder).requires_grad_(False)


def token_ids(count: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(VOCAB_SIZE, size=(count, LENGTH)))


def step(model: Any, path: list[int], checkpoint: bool, gated: bool) -> tuple[torch.Tensor, ...]:
    """One forward and backward pass of two sequences, one of them at the path; returns the loss and gradients."""
    bypass = random_bypass()
    bypass = Bypass(bypass.down.requires_grad_(), bypass.up.requires_grad_(), bypass.eps)
    masks = torch.zeros(2, LENGTH, NUM_LAYERS, dtype=torch.bool)
    masks[..., path] = True
    if not gated:
        masks[1, LENGTH // 2 :, 6] = True  # from there on, another path
    gates = masks[:, 0].float().requires_grad_() if gated else None
    hidden = routed_hidden(model, token_ids(), masks, "masked", bypass, gates, checkpoint=checkpoint)
    with gathered(model.lm_head):
        loss = next_token_loss(model.model.norm(hidden), model.lm_head.weight, token_ids())
    backward(model, loss)
    leaves = (bypass.down, bypass.up, *([] if gates is None else [gates]))
    gradients = [leaf.grad for leaf in leaves]
    assert all(gradient is not None for gradient in gradients)
    return loss.detach(), *gradients


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("gated", [False, True], ids=["paths given", "paths learned"])
@pytest.mark.parametrize("name", PATHS)
def test_any_path_gathers_the_same_layers_in_the_same_order(
    folder: Path, model: nn.Module, name: str, gated: bool, checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if processes on different paths would wait for each other for ever, or a layer runs without its weights."""
    whole = step(model, PATHS[name], checkpoint, gated)
    split = SplitModel(model, monkeypatch)
    found = step(model, PATHS[name], checkpoint, gated)
    assert all(torch.equal(one, other) for one, other in zip(whole, found, strict=True))
    assert split.log == ["embedding", *UP, "head", *DOWN]
    assert split.most == AT_ONCE
    assert split.gathered == set()


def test_a_backward_pass_goes_no_further_than_some_process_needs(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if layers are gathered of which no process needs a gradient."""
    split = SplitModel(model, monkeypatch, lowest_elsewhere=4)
    step(model, PATHS["layer 5 skipped"], checkpoint=False, gated=False)
    assert split.log == ["embedding", *UP, "head", *UP[:3:-1]]
    step(model, PATHS["layer 2 and 3 skipped"], checkpoint=False, gated=False)
    assert split.log[-6:] == UP[:1:-1]


@pytest.mark.parametrize(
    "measure",
    [
        lambda model: value_table(model),
        lambda model: forked_hidden(model, token_ids()[0], [full_path(NUM_LAYERS), path_of([0, 3, 7])]),
        lambda model: torch.from_numpy(single_divergences(model, token_ids(), random_bypass())),
        lambda model: torch.tensor(removal_order(model, token_ids(), random_bypass(), 5)),
        lambda model: torch.cat([part.flatten() for part in both(fit_bypass(model, token_ids(4), 4))]),
        lambda model: torch.cat([part.flatten() for part in both(fit_bypass(model, token_ids(4), 4, checkpoint=True))]),
    ],
    ids=["values", "many paths", "layers left out", "search", "regression", "regression, computed again"],
)
def test_what_is_measured_before_training_finds_the_weights(
    model: nn.Module, measure: Callable[[nn.Module], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a stage before training reads weights that are not there, or holds the whole model to have them."""
    with torch.no_grad():
        whole = measure(model)
        split = SplitModel(model, monkeypatch)
        assert torch.equal(measure(model), whole)
    assert split.most <= AT_ONCE
    assert split.gathered == set()


def both(bypass: Bypass) -> tuple[torch.Tensor, torch.Tensor]:
    return bypass.down, bypass.up
