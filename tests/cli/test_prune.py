"""The command `vllm-buddy prune`, from a method and a number of layers to what can be served."""

import json
import shlex
from pathlib import Path

import pytest

from tests.harness.tiny_models import NUM_LAYERS, load_model
from tests.importance.conftest import model_with_tokenizer, text_file
from vllm_buddy.artifact import load_artifact
from vllm_buddy.artifact.fingerprint import identify
from vllm_buddy.baselines import STATIC_METHODS, OrderFile, layer_order, static_path
from vllm_buddy.cli.main import main
from vllm_buddy.method import depth_for_budget, layers_of

__all__ = ["model_with_tokenizer", "text_file"]

KEPT = 5
SIZES = ["--tokens", "64", "--window", "32"]


def _prune(method: str, out: Path, model: Path, *options: str) -> int:
    return main(["prune", method, str(out), "--layers", str(KEPT), "--model", str(model), *options])


@pytest.mark.parametrize("method", STATIC_METHODS)
def test_both_forms_hold_the_layers_of_the_method(
    method: str,
    model_with_tokenizer: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if artifact, checkpoint and output name different layers, or a printed command cannot be pasted."""
    base = identify(model_with_tokenizer)
    orders, out = tmp_path / "orders.json", tmp_path / "with space"
    sizes = ["--text", str(text_file), *SIZES]
    options = ["--seed", "3"]
    files = []
    if method not in ("reverse", "evenly_spaced", "random"):
        assert main(["orders", str(orders), "--methods", method, "--model", str(model_with_tokenizer), *sizes]) == 0
        options, files = ["--orders", str(orders)], [OrderFile.load(orders)]
    order = layer_order(method, base, seed=3, files=files)
    kept = layers_of(static_path(order, KEPT))
    capsys.readouterr()
    assert _prune(method, out, model_with_tokenizer, *options) == 0
    shown = capsys.readouterr().out
    assert f"{KEPT} of {NUM_LAYERS} layers are kept: {' '.join(map(str, kept))}\n" in shown

    routed, stock = (shlex.split(line) for line in shown.splitlines() if line.startswith("  vllm-buddy serve "))
    buddy = json.loads(routed[-1])["buddy"]
    assert routed[2] == str(model_with_tokenizer)
    assert depth_for_budget(buddy["default_budget"], NUM_LAYERS) == KEPT
    artifact = load_artifact(Path(buddy["artifact"]))
    assert artifact.config.base_model == base
    assert artifact.config.prior.indicator == method
    for depth in range(3, NUM_LAYERS):
        assert artifact.router().path(None, depth) == static_path(order, depth)

    pruned, whole = load_model(Path(stock[2])), load_model(model_with_tokenizer)
    assert len(pruned.model.layers) == KEPT
    for new, old in enumerate(kept):
        found, expected = (model.model.layers[n].state_dict() for model, n in ((pruned, new), (whole, old)))
        assert all((found[name] == weight).all() for name, weight in expected.items())


def test_an_order_is_measured_as_by_the_command_orders(
    model_with_tokenizer: Path, text_file: Path, tmp_path: Path
) -> None:
    """Fails if pruning differs from the evaluation of the same method, or the record lacks the measured text."""
    orders, sizes = tmp_path / "orders.json", ["--text", str(text_file), *SIZES]
    assert main(["orders", str(orders), "--methods", "sleb", "--model", str(model_with_tokenizer), *sizes]) == 0
    assert _prune("sleb", tmp_path / "out", model_with_tokenizer, *sizes) == 0
    artifact = load_artifact(tmp_path / "out" / "artifact")
    order = OrderFile.load(orders).orders[0]
    assert [artifact.router().path(None, d) for d in (3, 5, 7)] == [static_path(order.layers, d) for d in (3, 5, 7)]
    assert artifact.config.prior.model_dump() == {"indicator": "sleb", "calibration": "text.txt", "num_tokens": 64}
    assert order.calibration_sha256 in (tmp_path / "out" / "artifact" / "run.yaml").read_text()


def test_the_card_says_how_to_make_it_again(
    model_with_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the recorded command makes something else, or the card does not say that nothing is trained."""
    assert _prune("random", tmp_path / "a", model_with_tokenizer, "--seed", "7", "--base-model-id", "me/my model") == 0
    folder = tmp_path / "a" / "artifact"
    card, record = (folder / "README.md").read_text(), (folder / "run.yaml").read_text()
    assert "**Nothing here is trained**" in card
    assert '\nbase_model: "me/my model"\n' in card
    assert "\nseed: 7\n" in record
    assert '\n  method: "random"\n' in record
    command = shlex.split(next(line for line in card.splitlines() if "vllm-buddy prune" in line))
    command[3] = str(tmp_path / "b")
    assert main(command[1:]) == 0
    assert (folder / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "artifact" / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "a" / "checkpoint" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "checkpoint" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("slep", [], "unknown static method 'slep'; known are shortgpt, sleb, delta_ppl, taylor, reverse"),
        ("reverse", ["--layers", "2"], "2 layers cannot be kept of 8; allowed are 3 to 7"),
        ("reverse", ["--layers", "8"], "8 layers cannot be kept of 8; allowed are 3 to 7"),
        ("sleb", [], "order of 'sleb' has not been measured for bytes"),
        ("sleb", [], "--text TEXT` and name FILE with --orders, or give a text to measure it on with --text"),
        ("sleb", ["--orders", "none.json"], "cannot read the layer orders none.json"),
        ("sleb", ["--text", "none.txt"], "cannot read the text file none.txt"),
        ("sleb", ["--text", "a", "--orders", "b"], "measured on --text or read from --orders; give one of them"),
        ("sleb", ["--text", "a", "--tokens", "0"], "tokens: Input should be greater than or equal to 1"),
        ("random", ["--text", "a"], "the order of 'random' comes from the layers' positions, so --text says nothing"),
        ("reverse", ["--tokens", "64"], "--tokens is for an order that is measured, and none is: give --text"),
        ("reverse", ["--window", "64"], "--window is for an order that is measured"),
        ("random", ["--device", "cpu"], "--device is for an order that is measured"),
        ("sleb", ["--orders", "b", "--dtype", "float32"], "--dtype is for an order that is measured"),
        ("taylor", ["--text", "a", "--candidates", "2"], "a search tries, and 'taylor' has none; leave it out"),
        ("reverse", ["--model", "none"], "no model at none"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    model_with_tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    options: list[str],
    message: str,
) -> None:
    """Fails if a mistake shows only after a model is loaded, or leaves a folder behind that blocks the next try."""
    for module in ("models.folder", "baselines.orders"):
        monkeypatch.setattr(f"vllm_buddy.{module}.load_model", lambda *args: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    assert _prune(method, Path("out"), model_with_tokenizer, *options) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["two\nlines", "text.txt/out"])
def test_a_folder_that_makes_no_artifact_is_told_before_anything_is_measured(
    model_with_tokenizer: Path,
    text_file: Path,
    tmp_path: Path,
    out: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if a name or a place that cannot be used is found when the order is measured."""
    monkeypatch.setattr("vllm_buddy.baselines.orders.load_model", lambda *args: pytest.fail("a model was loaded"))
    assert _prune("sleb", tmp_path / out, model_with_tokenizer, "--text", str(text_file), *SIZES) == 2
    error = capsys.readouterr().err
    assert "describe no artifact: name" in error or "cannot write to" in error
    assert list(tmp_path.iterdir()) == [text_file]


def test_a_model_that_routing_does_not_know_is_refused(
    model_with_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if an artifact is written for a model that no server accepts."""
    folder = tmp_path / "gemma"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(model_with_tokenizer / "model.safetensors")
    config = json.loads((model_with_tokenizer / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))
    assert _prune("reverse", tmp_path / "out", folder) == 2
    assert "model type 'gemma' is not supported; known are llama, mistral, qwen2, qwen3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(
    model_with_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a second run mixes its files with those of the first."""
    out = tmp_path / "out"
    out.mkdir()
    assert _prune("reverse", out, model_with_tokenizer) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert _prune("random", out, model_with_tokenizer) == 2
    assert "is not an empty folder; name a new one, so that nothing in it is lost" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (tmp_path / "file").write_text("")
    assert _prune("reverse", tmp_path / "file", model_with_tokenizer) == 2
    assert _prune("reverse", tmp_path / "file" / "below", model_with_tokenizer) == 2
    assert "cannot write to" in capsys.readouterr().err
