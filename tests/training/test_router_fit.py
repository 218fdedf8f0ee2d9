"""The Decision Module that is fitted to measured losses, and the path library that it picks from."""

import numpy as np
import pytest
import torch

from vllm_buddy.baselines import static_prior
from vllm_buddy.method.router import OMEGA
from vllm_buddy.training.router_fit import PathLosses, fit_decision
from vllm_buddy.training.start import Start

NUM_LAYERS = 8
ORDER = [3, 5, 2, 6, 1, 4]


def test_two_kinds_of_text_get_the_path_that_serves_each() -> None:
    """Fails if the fit cannot tell two clearly different kinds of text apart."""
    rng = np.random.default_rng(0)
    kind = rng.integers(2, size=200)
    means = torch.from_numpy(rng.normal(size=(200, 12)).astype(np.float32))
    means[:, 0] += torch.from_numpy(4.0 * kind - 2.0).float()
    newest = torch.from_numpy(rng.normal(size=(200, 12)).astype(np.float32))
    paths = [[0, 1, 2, 4, 6, 7], [0, 1, 3, 4, 6, 7]]
    noise = rng.normal(scale=0.01, size=(200, 2))
    losses = 0.5 + 0.1 * np.stack([kind, 1 - kind], axis=1) + noise
    fit = fit_decision(means, newest, [PathLosses(6, paths, losses)], _bias(), width=8, seed=0)
    (figures,) = fit.figures
    assert figures.oracle <= figures.routed < figures.static - 0.03
    assert figures.routed < 0.52


def test_text_that_says_nothing_keeps_the_static_path() -> None:
    """Fails if a fit to noise routes away from the best path."""
    rng = np.random.default_rng(0)
    means, newest = torch.from_numpy(rng.normal(size=(2, 200, 12)).astype(np.float32))
    paths = [[0, 1, 2, 4, 6, 7], [0, 1, 3, 4, 6, 7]]
    losses = np.array([0.5, 0.8]) + rng.normal(scale=0.01, size=(200, 2))
    fit = fit_decision(means, newest, [PathLosses(6, paths, losses)], _bias(), width=8, seed=0)
    assert fit.figures[0].routed == pytest.approx(fit.figures[0].static)


def test_the_library_begins_with_the_static_path_and_has_no_choice_where_nothing_was_trained() -> None:
    """Fails if a depth below the trained range has no path, or has paths that were not compared."""
    other = [6, 1, 2, 3, 4, 5]
    library = Start(ORDER, [other, ORDER], None).library(3, smallest=4)
    assert sorted(library) == [3, 4, 5, 6, 7]
    assert [set(path) for path in library.pop(3)] == [set(range(NUM_LAYERS)) - set(ORDER[:5])]
    for depth, paths in library.items():
        assert set(paths[0]) == set(range(NUM_LAYERS)) - set(ORDER[: NUM_LAYERS - depth])
        assert set(paths[1]) == set(range(NUM_LAYERS)) - set(other[: NUM_LAYERS - depth])
        assert len(paths) == len({tuple(path) for path in paths}) <= 3
        assert {len(path) for path in paths} == {depth}


def _bias() -> torch.Tensor:
    prior = static_prior(ORDER)
    return torch.from_numpy(OMEGA * (prior - prior.mean()) / prior.std()).float()
