"""Tests of each indicator against a second implementation that uses Hugging Face's own forward."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.harness.tiny_models import NUM_LAYERS
from tests.importance.conftest import USELESS_LAYER, Measured
from vllm_buddy.errors import CalibrationError
from vllm_buddy.importance import INDICATORS, find_indicator
from vllm_buddy.importance.perplexity import BUDGETS, perplexity_by_budget, static_perplexity
from vllm_buddy.method import path_of, top_k_path
from vllm_buddy.method.reference import routed_logits

# float32 sums over a layer's weights or a window's tokens in another order
RELATIVE_TOLERANCE = 1e-4
BF16_TOLERANCE = 0.03  # 8 bits of mantissa, through 8 layers and back


def _silent(done: int, total: int) -> None:
    del done, total


def _loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    return model(windows, labels=windows, use_cache=False).loss


def test_taylor_is_the_sum_of_weight_times_gradient(measured: Measured) -> None:
    """Fails if absolute values are taken per window instead of after the mean, or an end layer is included."""
    found = INDICATORS["taylor"].measure(measured.model, measured.windows, _silent)
    model = copy.deepcopy(measured.model)
    _loss(model, measured.windows).backward()
    wanted = [
        sum((p.detach() * p.grad).abs().sum().item() for p in layer.parameters()) for layer in model.model.layers[1:-1]
    ]
    np.testing.assert_allclose(found, wanted, rtol=RELATIVE_TOLERANCE)


def test_taylor_in_bf16_sums_in_float32(measured: Measured) -> None:
    """Fails if gradients of many windows are summed in bf16, where small ones are lost."""
    wanted = INDICATORS["taylor"].measure(measured.model, measured.windows, _silent)
    model = copy.deepcopy(measured.model).bfloat16()
    found = INDICATORS["taylor"].measure(model, measured.windows.repeat(16, 1), _silent)
    np.testing.assert_allclose(found, wanted, rtol=BF16_TOLERANCE)


def test_taylor_leaves_the_model_as_it_was(measured: Measured) -> None:
    """Fails if gradients are kept after the measurement, or parameters stay frozen."""
    INDICATORS["taylor"].measure(measured.model, measured.windows[:1], _silent)
    assert all(p.grad is None and p.requires_grad for p in measured.model.parameters())


def test_delta_ppl_is_the_perplexity_without_the_layer(measured: Measured) -> None:
    """Fails if the layers above the skipped one run on that layer's output."""
    found = INDICATORS["delta_ppl"].measure(measured.model, measured.windows, _silent)
    with torch.no_grad():
        dense = math.exp(_loss(measured.model, measured.windows))
        wanted = []
        for skipped in range(1, NUM_LAYERS - 1):
            model = copy.deepcopy(measured.model)
            del model.model.layers[skipped]
            model.config.num_hidden_layers -= 1
            wanted.append(math.exp(_loss(model, measured.windows)) - dense)
    np.testing.assert_allclose(found, wanted, rtol=RELATIVE_TOLERANCE, atol=RELATIVE_TOLERANCE * dense)


def test_cosine_compares_input_and_output(measured: Measured) -> None:
    """Fails if the comparison is shifted by one layer."""
    found = INDICATORS["cosine"].measure(measured.model, measured.windows, _silent)
    with torch.no_grad():
        states = measured.model(measured.windows, output_hidden_states=True).hidden_states
    wanted = [
        1 - float(torch.cosine_similarity(states[i], states[i + 1], dim=-1).mean()) for i in range(1, NUM_LAYERS - 1)
    ]
    np.testing.assert_allclose(found, wanted, rtol=RELATIVE_TOLERANCE, atol=1e-6)


@pytest.mark.parametrize("name", ["delta_ppl", "cosine"])
def test_a_layer_that_does_nothing_does_not_matter(measured: Measured, name: str) -> None:
    """Fails if the sign is wrong, so that the most important layers are skipped first."""
    raw = INDICATORS[name].measure(measured.model, measured.windows, _silent)
    assert raw[USELESS_LAYER - 1] == pytest.approx(0, abs=1e-3)
    others = np.delete(raw, USELESS_LAYER - 1)
    assert np.abs(others).min() > 0.01


def test_progress_is_told_for_every_window(measured: Measured) -> None:
    """Fails if progress is not reported for every window, so that a long measurement seems to hang."""
    for indicator in INDICATORS.values():
        told: list[tuple[int, int]] = []
        indicator.measure(measured.model, measured.windows, lambda done, total, told=told: told.append((done, total)))
        assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_static_perplexity_is_the_references(measured: Measured) -> None:
    """Fails if the perplexity in the model card differs from that of the routed reference."""
    for layers in ([0, 2, 5, 7], list(range(NUM_LAYERS))):
        losses = []
        for window in measured.windows.tolist():
            logits = routed_logits(measured.model, window, [path_of(layers)] * len(window), "masked")
            losses.append(float(nn.functional.cross_entropy(logits[:-1], torch.tensor(window[1:]))))
        found = static_perplexity(measured.model, measured.windows, layers)
        assert found == pytest.approx(math.exp(np.mean(losses)), rel=RELATIVE_TOLERANCE)


def test_perplexity_by_budget_follows_each_prior(measured: Measured) -> None:
    """Fails if the figures of one prior are those of another prior or of another depth."""
    priors = {"up": np.arange(6.0), "down": -np.arange(6.0)}
    table = perplexity_by_budget(measured.model, measured.windows, priors)
    for name, prior in priors.items():
        assert tuple(table[name]) == BUDGETS
        path = top_k_path(prior, 4)
        layers = [layer for layer in range(NUM_LAYERS) if path >> layer & 1]
        assert table[name][0.5] == static_perplexity(measured.model, measured.windows, layers)
    assert table["up"][1.0] == table["down"][1.0]
    assert table["up"][0.5] != table["down"][0.5]


def test_unknown_indicator_lists_the_known() -> None:
    """Fails if a misspelt indicator falls back to a default, or the error does not list the known ones."""
    with pytest.raises(CalibrationError, match="unknown indicator 'tailor'; known are taylor, delta_ppl, cosine"):
        find_indicator("tailor")
