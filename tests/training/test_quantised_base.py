"""Training on a base model in 8 or 4 bits."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.quantised import FORMATS, quantise
from tests.training.conftest import run
from vllm_buddy.artifact import identify
from vllm_buddy.errors import ModelError, UnsupportedError
from vllm_buddy.models.folder import load_model
from vllm_buddy.training.dry_run import dry_run
from vllm_buddy.training.stage1_settings import Stage1Settings

# Losses are divergences from the quantised model itself, so they differ by what rounding does to a layer that is left
# out. The tiny model's weights are random, which is the worst case for 4 bits.
TOLERANCE = {"int8": 0.05, "nf4": 0.3}
KINDS = tuple(TOLERANCE)
RECIPES = {
    "bypass": {},
    "a learned router": {"paths": "learned", "prior": "reverse"},
    "distill": {"recipe": "distill", "paths": "reverse"},
    "paper": {"recipe": "paper", "paths": "learned", "prior": "reverse", "rank": 8},
}


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(
    "recipe", [name if name == "bypass" else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_near_those_of_the_unquantised_base(
    settings: dict[str, Any], kind: str, recipe: str, tmp_path: Path, bitsandbytes: Any
) -> None:
    """Fails if no gradient passes a quantised layer, the teacher is of another base, or the artifact is."""
    settings = settings | RECIPES[recipe] | {"cache_dir": tmp_path / "cache", "dtype": "bfloat16"}
    _, _, losses = run(settings)
    quantised_run = settings | {"out": tmp_path / "quantised", "base_quantisation": kind}
    artifact, _, found = run(quantised_run)
    assert found != losses
    assert found == pytest.approx(losses, rel=TOLERANCE[kind])
    assert artifact.config.base_model.same_model(identify(settings["model"]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_also_after_calls_without_one(model_dir: Path, kind: str, bitsandbytes: Any) -> None:
    """Fails if the package repacks weights at a call without a gradient, as of the teacher."""
    ids = torch.arange(16)[None]
    grads = []
    for quantisation in (None, kind):
        model = load_model(model_dir, torch.bfloat16, quantisation=quantisation).requires_grad_(False)
        with torch.no_grad():
            model(ids)
        states = model.model.embed_tokens(ids).requires_grad_()
        model.model.layers[0].mlp(states).float().square().sum().backward()
        grads.append(states.grad.float())
    assert (grads[0] - grads[1]).norm() < TOLERANCE[kind] * grads[0].norm()


def test_a_dry_run_tells_the_smaller_base(settings: dict[str, Any], bitsandbytes: Any) -> None:
    """Fails if a base in 4 bits takes the memory of the whole one."""
    sizes = {}
    for kind in (None, *KINDS):
        memory = dry_run(Stage1Settings(**settings | {"base_quantisation": kind}), settings["model"]).memory
        sizes[kind] = memory[f"base weights ({kind or 'float32'})"]
    assert sizes["nf4"] < sizes["int8"] < sizes[None]


def test_without_the_package_it_says_what_to_install(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a missing package ends in a traceback, or the base is trained unquantised."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ModelError, match=r"nf4 needs bitsandbytes: pip install bitsandbytes"):
        run(settings | {"base_quantisation": "nf4"})
    with pytest.raises(ValueError, match="'int8' or 'nf4'"):
        run(settings | {"base_quantisation": "fp4"})


@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantised_checkpoint_is_refused_with_the_way_out(
    settings: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    """Fails if a quantised checkpoint ends in an error of another package, or the message offers no way on."""
    folder = quantise(settings["model"], tmp_path / "quantised", kind)
    assert "quantization_config" in json.loads((folder / "config.json").read_text())
    with pytest.raises(UnsupportedError, match=r"measure the model it was made from.*base_quantisation=nf4"):
        run(settings | {"model": folder})


@pytest.fixture
def model_dir(settings: dict[str, Any]) -> Path:
    return settings["model"]
