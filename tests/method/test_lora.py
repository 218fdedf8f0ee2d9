"""Tests of merging low-rank changes into base weights."""

import pytest
import torch

from tests.harness.tiny_models import load_model
from tests.method.conftest import Tiny
from vllm_buddy.errors import ArtifactError
from vllm_buddy.method.lora import LoraDeltas

NAMES = ("model.layers.2.self_attn.v_proj", "model.layers.5.mlp.down_proj")
RANK = 4
ALPHA = 6.0


def _deltas(tiny: Tiny, names: tuple[str, ...] = NAMES) -> LoraDeltas:
    generator = torch.Generator().manual_seed(0)
    a, b = {}, {}
    for name in names:
        out_features, in_features = tiny.model.get_parameter(f"{name}.weight").shape
        a[name] = torch.randn(RANK, in_features, generator=generator)
        b[name] = torch.randn(out_features, RANK, generator=generator)
    return LoraDeltas(a, b, ALPHA)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # fp32 sums of 4 products of magnitude 10; in bf16, half a step either way where the sum lies between two numbers
    [(torch.float32, {"atol": 1e-5, "rtol": 0}), (torch.bfloat16, {"atol": 0, "rtol": 2**-7})],
)
def test_merging_adds_the_scaled_product_and_rounds_once(tiny: Tiny, dtype: torch.dtype, tolerance: dict) -> None:
    """Fails if merging uses another scale, computes the product in the weight's dtype, or changes other weights."""
    deltas, model = _deltas(tiny), load_model(tiny.folder, dtype)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    deltas.merge_into(model)
    for name, weight in model.named_parameters():
        module = name.removesuffix(".weight")
        if module not in NAMES:
            assert torch.equal(weight, before[name])
            continue
        change = ALPHA / RANK * (deltas.b[module].double() @ deltas.a[module].double())
        torch.testing.assert_close(weight, (before[name].double() + change).to(dtype), **tolerance)
        assert not torch.equal(weight, before[name])


def test_merging_while_loading_is_merging_in_place(tiny: Tiny) -> None:
    """Fails if merging while weights are loaded, as serving does, gives other weights than merging in place."""
    deltas, model = _deltas(tiny), load_model(tiny.folder)
    streamed = dict(deltas.merge_all((name, p.detach().clone()) for name, p in model.named_parameters()))
    deltas.merge_into(model)
    assert all(torch.equal(streamed[name], p) for name, p in model.named_parameters())


def test_weights_that_are_missing_or_of_another_shape(tiny: Tiny) -> None:
    """Fails if a change of a missing weight, or of one with another shape, is ignored."""
    model = load_model(tiny.folder)
    name = NAMES[0]
    other = LoraDeltas({name: torch.zeros(2, 3)}, {name: torch.zeros(5, 2)}, ALPHA)
    with pytest.raises(ArtifactError, match=rf"LoRA of {name} is for a weight of shape \[5, 3\], the model's has"):
        other.merge_into(model)
    missing = LoraDeltas({"model.x": torch.zeros(2, 3)}, {"model.x": torch.zeros(5, 2)}, ALPHA)
    with pytest.raises(ArtifactError, match=r"no weight of model.x"):
        missing.merge_into(model)
    with pytest.raises(ArtifactError, match=r"no weight of model.x"):
        list(missing.merge_all(iter(model.named_parameters())))
