"""Tests of pruning orders: in which order layers are removed, and to which model an order belongs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.harness.full_disk import full_disk
from tests.harness.tiny_models import NUM_LAYERS, VOCAB_SIZE, load_model, save_tiny_model
from vllm_buddy.artifact import SHIPPED_DIR, identify, load_artifact
from vllm_buddy.baselines import (
    MEASURED,
    POSITIONAL,
    STATIC_METHODS,
    LayerOrder,
    OrderFile,
    layer_order,
    shipped_orders,
    sleb,
    static_path,
)
from vllm_buddy.baselines.sleb import search_cost, sleb_order
from vllm_buddy.cli.main import main
from vllm_buddy.errors import BaselineError
from vllm_buddy.importance.layer_stack import LayerStack
from vllm_buddy.method import layers_of
from vllm_buddy.models.embedded import DEFAULT_MODEL

USELESS = (5, 2)  # layers that add nothing to the hidden state
TOLERANCE = 1e-12  # equal losses differ by nothing, because no sum is computed in two orders
SIZES = ["--tokens", "64", "--window", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("orders"), "llama")


@pytest.fixture
def model(folder: Path) -> nn.Module:
    model = load_model(folder)
    with torch.no_grad():
        for index in USELESS:
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    return model


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, 16)))


@pytest.mark.parametrize("method", ["shortgpt", "taylor"])
def test_layers_that_do_nothing_leave_first(method: str, model: nn.Module, windows: torch.Tensor) -> None:
    """Fails if importance is sorted in the wrong direction, or layer indices are shifted by one."""
    order = MEASURED[method].order(model, windows, lambda done, total: None)
    assert order[:2] == sorted(USELESS, reverse=True)
    assert sorted(order) == list(range(1, NUM_LAYERS - 1))


def test_delta_ppl_takes_the_layer_whose_loss_is_lowest(model: nn.Module, windows: torch.Tensor) -> None:
    """Fails if the order is not that of the loss without each layer."""
    order = MEASURED["delta_ppl"].order(model, windows, lambda done, total: None)
    losses = [_loss(model, windows, skipped=[layer]) for layer in order]
    assert losses == sorted(losses)


def test_sleb_measures_again_after_each_layer(model: nn.Module, windows: torch.Tensor) -> None:
    """Fails if a trial uses hidden states of removed layers, or the layers are ranked only once."""
    left = list(range(1, NUM_LAYERS - 1))
    gone: list[int] = []
    while left:
        losses = {layer: _loss(model, windows, skipped=[*gone, layer]) for layer in left}
        best = min(losses.values())
        gone.append(max(layer for layer in left if losses[layer] <= best + TOLERANCE))
        left.remove(gone[-1])
    seen: list[int] = []
    assert sleb_order(model, windows, lambda done, total: seen.append(done)) == gone
    assert seen == list(range(1, NUM_LAYERS - 1))
    once_and_for_all = MEASURED["delta_ppl"].order(model, windows, lambda done, total: None)
    assert gone != once_and_for_all  # otherwise this test could not distinguish the two


@pytest.mark.parametrize("candidates", [None, 100, 2])
def test_sleb_costs_what_it_says(
    model: nn.Module, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch, candidates: int | None
) -> None:
    """Fails if hidden states are computed twice, a search is longer than said, or fewer candidates save nothing."""
    passes = {"layer": 0, "_summed_loss": 0}
    for name in passes:
        original = getattr(LayerStack, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> torch.Tensor:
            passes[name] += 1
            return original(*args)

        monkeypatch.setattr(LayerStack, name, counted)
    notes: list[str] = []
    order = sleb_order(model, windows, lambda done, total: None, candidates, notes.append)
    assert sorted(order) == list(range(1, NUM_LAYERS - 1))
    most, forecast = search_cost(NUM_LAYERS, candidates), (2, 1)
    layers, heads = passes["layer"] - forecast[0], passes["_summed_loss"] - forecast[1]
    assert 0 < layers <= len(windows) * most.layers
    assert 0 < heads <= len(windows) * most.heads
    plain = sum(left * (left + 3) // 2 for left in range(2, NUM_LAYERS - 1))  # each round from the first layer on
    assert layers < len(windows) * plain * (1.0 if candidates != 2 else 0.7)
    assert len(notes) == 1
    assert f"{most.layers:,} layer and {most.heads:,} head passes" in notes[0]
    if candidates == 100:
        assert order == sleb_order(model, windows, lambda done, total: None)


def test_candidates_are_the_layers_that_cost_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a layer that is tried again counts as cheaper than others only because it was."""
    costs = {1: 5.0, 2: 100.0, 3: 0.5, 4: 2.0, 5: 3.0, 6: 4.0}
    tried: list[int] = []

    class Trials:
        def __init__(self, *_: Any) -> None:
            self.middle, self._loss = list(costs), 1000.0

        def loss(self, layer: int, most: float) -> float:
            tried.append(layer)
            return self._loss + costs[layer]

        def remove(self, layer: int) -> None:
            self.middle.remove(layer)
            self._loss += costs[layer]

    monkeypatch.setattr(sleb, "_Trials", Trials)
    monkeypatch.setattr(sleb, "LayerStack", lambda *_: SimpleNamespace(num_layers=8))
    monkeypatch.setattr(sleb, "_forecast", lambda *_: "")
    order = sleb_order(nn.Module(), torch.zeros(1, 4), lambda done, total: None, candidates=2)
    assert order == [3, 4, 5, 6, 1, 2]
    assert tried[6:] == [4, 5, 5, 6, 6, 1, 1, 2]


@pytest.mark.parametrize("num_layers", [3, 4, 8, 30])
@pytest.mark.parametrize("method", POSITIONAL)
def test_positional_orders_hold_every_middle_layer_once(method: str, num_layers: int) -> None:
    """Fails if an order lacks a middle layer, or holds the first or the last layer."""
    assert sorted(POSITIONAL[method](num_layers, 0)) == list(range(1, num_layers - 1))


def test_positional_orders() -> None:
    """Fails if `reverse` removes layers from the start, `evenly_spaced` adjacent ones, or `random` ignores its seed."""
    assert POSITIONAL["reverse"](6, 0) == [4, 3, 2, 1]
    assert POSITIONAL["evenly_spaced"](9, 0)[:3] == [4, 6, 2]
    assert POSITIONAL["random"](30, 1) == POSITIONAL["random"](30, 1) != POSITIONAL["random"](30, 2)


def test_paths_of_all_depths_are_nested() -> None:
    """Fails if the path of a depth is not the path of the next greater depth without one layer."""
    order = [3, 1, 4, 2]
    assert layers_of(static_path(order, 6)) == [0, 1, 2, 3, 4, 5]
    assert layers_of(static_path(order, 5)) == [0, 1, 2, 4, 5]
    assert layers_of(static_path(order, 3)) == [0, 2, 5]


def test_shipped_orders_are_those_of_the_embedded_model() -> None:
    """Fails if an order of the embedded model is not shipped, or the shipped orders belong to another model."""
    (file,) = shipped_orders()
    assert file.base_model.num_layers == 30
    assert {order.method for order in file.orders} == set(MEASURED)
    for name in STATIC_METHODS:
        assert sorted(layer_order(name, file.base_model)) == list(range(1, 29))
    assert file.base_model.same_model(load_artifact(SHIPPED_DIR / DEFAULT_MODEL).config.base_model)


def test_another_model_has_no_order(folder: Path) -> None:
    """Fails if the order of one model is used for another, or an unknown method is accepted."""
    with pytest.raises(BaselineError, match=r"order of 'sleb' has not been measured for .*vllm-buddy orders"):
        layer_order("sleb", identify(folder))
    with pytest.raises(BaselineError, match="unknown static method 'slep'; known are shortgpt, sleb, delta_ppl"):
        layer_order("slep", identify(folder))


def test_command_measures_and_keeps(
    model_with_tokenizer: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if measuring a method again loses the other orders, or the file names another model."""
    out = tmp_path / "orders.json"
    command = ["orders", str(out), "--text", str(text_file), "--model", str(model_with_tokenizer), *SIZES]
    assert main([*command, "--methods", "shortgpt,sleb"]) == 0
    assert main([*command, "--methods", "shortgpt,taylor"]) == 0
    file = OrderFile.load(out)
    assert {order.method for order in file.orders} == {"shortgpt", "sleb", "taylor"}
    assert file.base_model.same_model(identify(model_with_tokenizer))
    order = layer_order("sleb", identify(model_with_tokenizer), files=[file])
    assert f"sleb: {' '.join(map(str, order))}" in capsys.readouterr().out
    assert {(o.calibration, o.num_tokens, o.window) for o in file.orders} == {("text.txt", 64, 32)}
    assert main([*command, "--methods", "sleb,taylor", "--candidates", "2", "--dtype", "bfloat16"]) == 0
    assert "sleb: at most 2 windows x " in capsys.readouterr().err
    assert {order.method: order.candidates for order in OrderFile.load(out).orders} == {
        "shortgpt": None, "sleb": 2, "taylor": None,
    }  # fmt: skip


def test_mistakes_are_one_line(
    model_with_tokenizer: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a wrong option ends in a traceback, or orders of two models are written to one file."""
    out = tmp_path / "orders.json"
    other = identify(save_tiny_model(tmp_path / "other", "llama", seed=1))
    for options, message in (
        (["--methods", "reverse"], "'reverse' is not a method that is measured; known are shortgpt, sleb"),
        (["--text", str(tmp_path / "none")], "cannot read the text file"),
        (["--device", "cuda:77", *SIZES], "no device 'cuda:77'; here are auto, cpu"),
        (["--candidates", "0"], "candidates: Input should be greater than or equal to 1"),
        (["--tokens", "5000"], "text.txt holds 1000 tokens, but 5000 for calibration"),
    ):
        assert main(["orders", str(out), "--text", str(text_file), "--model", str(model_with_tokenizer), *options]) == 2
        assert message in capsys.readouterr().err
    OrderFile(base_model=other).save(out)
    assert main(["orders", str(out), "--text", str(text_file), "--model", str(model_with_tokenizer), *SIZES]) == 2
    assert "holds orders of other" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_found_before_measuring(
    model_with_tokenizer: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if hours of measuring end in a traceback, because the results can be put nowhere."""
    monkeypatch.setattr("vllm_buddy.baselines.measure_order", None)
    options = ["--text", str(text_file), "--model", str(model_with_tokenizer), *SIZES]
    assert main(["orders", str(text_file / "orders.json"), *options]) == 2
    assert f"cannot write the layer orders {text_file}/orders.json: " in capsys.readouterr().err
    assert main(["orders", str(tmp_path), *options]) == 2
    assert "Is a directory" in capsys.readouterr().err


def test_a_full_disk_leaves_the_orders_that_were_there(folder: Path, tmp_path: Path) -> None:
    """Fails if a full disk cuts off the file with the orders of hours before."""
    path = tmp_path / "orders.json"
    file = OrderFile(base_model=identify(folder))
    file.save(path)
    order = LayerOrder(
        method="sleb", calibration="t", calibration_sha256="0", num_tokens=1, window=1, layers=[1, 2, 3, 4, 5, 6]
    )
    with (
        full_disk(),
        pytest.raises(BaselineError, match=r"cannot write .*orders\.json: File too large"),
    ):
        file.with_order(order).save(path)
    assert OrderFile.load(path) == file
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_another_form(folder: Path, tmp_path: Path) -> None:
    """Fails if a file of another format, or an incomplete order, is accepted."""
    path = tmp_path / "orders.json"
    path.write_text("[]")
    with pytest.raises(BaselineError, match="is not a file of layer orders"):
        OrderFile.load(path)
    with pytest.raises(BaselineError, match="cannot read the layer orders"):
        OrderFile.load(tmp_path / "none")
    order = LayerOrder(
        method="sleb", calibration="t", calibration_sha256="0", num_tokens=1, window=1, layers=[1, 2, 3, 4, 5]
    )
    with pytest.raises(ValueError, match="the order of 'sleb' does not hold each of layers 1 to 6 once"):
        OrderFile(base_model=identify(folder), orders=[order])


def _loss(model: nn.Module, windows: torch.Tensor, skipped: list[int]) -> float:
    stack = LayerStack(model, windows.shape[1])
    layers = [layer for layer in range(NUM_LAYERS) if layer not in skipped]
    with torch.no_grad():
        return sum(float(stack.loss(stack.run(layers, stack.embed(window)), window)) for window in windows)
