"""Tests of `vllm-buddy prior`, which makes an artifact from a model folder and a text."""

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.harness.tiny_models import NUM_LAYERS, load_model, save_tiny_model
from vllm_buddy.artifact import load_artifact
from vllm_buddy.artifact.fingerprint import identify
from vllm_buddy.cli.main import main
from vllm_buddy.importance import INDICATORS, PriorResult, PriorSettings, build_prior
from vllm_buddy.method import path_of

SIZES = ["--tokens", "64", "--window", "32"]


def _prior(model: Path, out: Path, text: Path, *options: str) -> int:
    return main(["prior", str(model), str(out), "--text", str(text), *SIZES, *options])


@pytest.mark.parametrize("indicator", INDICATORS)
def test_artifact_routes_by_the_indicator(
    model_with_tokenizer: Path, tmp_path: Path, text_file: Path, indicator: str
) -> None:
    """Fails if the artifact cannot be loaded, belongs to another model, or does not route by its prior."""
    out = tmp_path / "out"
    assert _prior(model_with_tokenizer, out, text_file, "--indicator", indicator, "--library", "3") == 0
    artifact = load_artifact(out)
    assert artifact.config.name == "out"
    assert artifact.config.base_model == identify(model_with_tokenizer)
    assert artifact.config.prior.model_dump() == {
        "indicator": indicator, "calibration": "text.txt", "num_tokens": 64,
    }  # fmt: skip
    assert artifact.decision is None
    for depth in range(3, NUM_LAYERS):
        path = artifact.router().path(None, depth)
        assert path.bit_count() == depth
        assert path == artifact.router(library=True).path(None, depth)
        assert artifact.config.library is not None
        assert path_of(artifact.config.library[depth][0]) == path


def test_the_same_command_gives_the_same_artifact(model_with_tokenizer: Path, tmp_path: Path, text_file: Path) -> None:
    """Fails if the command in the model card makes another artifact."""
    options = ["--name", "again", "--heldout", "64", "--compare", "--base-model-id", "someone/tiny model"]
    assert _prior(model_with_tokenizer, tmp_path / "a", text_file, *options) == 0
    line = next(line for line in (tmp_path / "a" / "README.md").read_text().splitlines() if "vllm-buddy prior" in line)
    command = shlex.split(line)
    assert command[:2] == ["vllm-buddy", "prior"]
    command[3] = str(tmp_path / "b")
    assert main(command[1:]) == 0
    assert load_artifact(tmp_path / "a").digest == load_artifact(tmp_path / "b").digest


def test_card_and_record_say_what_was_done(
    model_with_tokenizer: Path, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the model card does not say that nothing is trained, or the record lacks an entry."""
    out = tmp_path / "out"
    assert _prior(model_with_tokenizer, out, text_file, "--heldout", "64", "--compare") == 0
    card = (out / "README.md").read_text()
    assert "**Nothing here is trained.**" in card
    assert "| indicator | budget 1 (8 layers) | budget 0.9 (7 layers) | budget 0.75 (6 layers) |" in card
    for name in INDICATORS:
        assert f"| `{name}`" in card
    assert "| `taylor` (this artifact) |" in card
    record = (out / "run.yaml").read_text()
    assert hashlib.sha256(text_file.read_bytes()).hexdigest() in record
    for key in ("command", "date", "seed", "settings", "text", "base_model", "perplexity", "versions"):
        assert f"\n{key}:" in f"\n{record}"
    shown = capsys.readouterr()
    assert "perplexity by budget, cosine:" in shown.out
    assert "taylor: 2 of 2" in shown.err


def test_device_and_dtype(
    model_with_tokenizer: Path, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a device that is not there ends in a traceback, or the dtype is not recorded."""
    assert _prior(model_with_tokenizer, tmp_path / "none", text_file, "--device", "cuda:77") == 2
    assert "no device 'cuda:77'; here are auto, cpu" in capsys.readouterr().err
    assert _prior(model_with_tokenizer, tmp_path / "none", text_file, "--dtype", "int8") == 2
    assert "dtype: Input should be 'bfloat16' or 'float32'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    options = ["--device", "cpu", "--dtype", "bfloat16", "--heldout", "64"]
    assert _prior(model_with_tokenizer, tmp_path / "out", text_file, *options) == 0
    assert "`masked`, bfloat16." in (tmp_path / "out" / "README.md").read_text()
    assert 'dtype: "bfloat16"' in (tmp_path / "out" / "run.yaml").read_text()


def test_record_names_the_code_that_ran(
    model_with_tokenizer: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the commit is looked up after the measurement, during which the source may have changed."""
    commits = iter(["before", "after"])
    monkeypatch.setattr("vllm_buddy.artifact.provenance.source_commit", lambda: next(commits))
    build = build_prior

    def build_while_source_moves(*args: Any) -> PriorResult:
        assert next(commits) == "after"
        return build(*args)

    monkeypatch.setattr("vllm_buddy.importance.build.build_prior", build_while_source_moves)
    assert _prior(model_with_tokenizer, tmp_path / "out", text_file) == 0
    assert '\ncommit: "before"\n' in (tmp_path / "out" / "run.yaml").read_text()


def test_card_without_held_out_text_has_no_table(model_with_tokenizer: Path, tmp_path: Path, text_file: Path) -> None:
    """Fails if the card shows an empty table, or figures that were not measured."""
    assert _prior(model_with_tokenizer, tmp_path / "out", text_file) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Perplexity" not in card
    assert "path library" not in card


def test_files_can_be_read_by_others(model_with_tokenizer: Path, tmp_path: Path, text_file: Path) -> None:
    """Fails if only the owner can read the tensors, so that users cannot load a packaged artifact."""
    assert _prior(model_with_tokenizer, tmp_path / "out", text_file) == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 4
    assert len(set(modes.values())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--indicator", "random"], "unknown indicator 'random'; known are taylor, delta_ppl, cosine"),
        (["--tokens", "0"], "not a valid setting: tokens: Input should be greater than or equal to 1"),
        (["--library", "-1"], "not a valid setting: library:"),
        (["--compare"], "needs held-out text to compare on; give --heldout N as well"),
        (["--tokens", "2000"], "text.txt holds 1000 tokens, but 2000 for calibration"),
    ],
)
def test_mistakes_are_one_line(
    model_with_tokenizer: Path,
    tmp_path: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    """Fails if a wrong setting ends in a traceback, or leaves files behind."""
    assert _prior(model_with_tokenizer, tmp_path / "out", text_file, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("out", ["--name", "two\nlines"], "these settings describe no artifact: name"),
        ("text.txt/out", [], "cannot write to"),
        ("x" * 300, [], "cannot write to"),
    ],
)
def test_a_name_or_a_place_that_cannot_be_is_told_before_anything_is_measured(
    model_with_tokenizer: Path,
    tmp_path: Path,
    text_file: Path,
    out: str,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if a measurement is lost because its artifact cannot be named so, or not be written there."""
    monkeypatch.setattr("vllm_buddy.importance.build.load_model", lambda *_: pytest.fail("a model was loaded"))
    before = sorted(text_file.parent.iterdir())
    assert _prior(model_with_tokenizer, text_file.parent / out, text_file, *options) == 2
    assert message in capsys.readouterr().err
    assert sorted(text_file.parent.iterdir()) == before


def test_folders_that_cannot_be_used(
    model_with_tokenizer: Path, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if an existing folder is overwritten, or a model that is not supported is measured."""
    assert _prior(model_with_tokenizer, tmp_path, text_file) == 2
    assert "is not an empty folder; name a new one" in capsys.readouterr().err
    assert _prior(tmp_path / "none", tmp_path / "out", text_file) == 2
    assert "is neither a folder nor an embedded model" in capsys.readouterr().err
    bare = save_tiny_model(tmp_path / "bare", "qwen3")
    assert _prior(bare, tmp_path / "out", text_file) == 2
    assert "has no tokenizer files" in capsys.readouterr().err
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    assert _prior(bare, tmp_path / "out", text_file) == 2
    assert "model type 'gpt2' is not supported; known are llama, mistral, qwen2, qwen3" in capsys.readouterr().err
    (bare / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    assert _prior(bare, tmp_path / "out", text_file) == 2
    assert "transformers cannot read config.json" in capsys.readouterr().err
    quantised = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (bare / "config.json").write_text(json.dumps(quantised))
    assert _prior(bare, tmp_path / "out", text_file) == 2
    assert "is quantised; measure the model it was made from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_card_that_cannot_be_written_is_one_line(
    model_with_tokenizer: Path,
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if a disk that is full after the weights ends in a traceback."""

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_buddy.importance.prior_record.run_record", full)
    assert _prior(model_with_tokenizer, tmp_path / "out", text_file) == 2
    assert f"cannot write the card of the artifact to {tmp_path}/out: No space left" in capsys.readouterr().err


def test_every_setting_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a setting of the schema has no option on the command line."""
    with pytest.raises(SystemExit):
        main(["prior", "--help"])
    shown = capsys.readouterr().out
    for name, field in PriorSettings.model_fields.items():
        assert (name.upper() if name in ("model_dir", "out") else f"--{name.replace('_', '-')}") in shown
        assert field.description


def test_measuring_leaves_the_model_folder_alone(model_with_tokenizer: Path, tmp_path: Path, text_file: Path) -> None:
    """Fails if a measurement writes to the model folder."""
    before = {path.name: path.read_bytes() for path in model_with_tokenizer.iterdir()}
    assert _prior(model_with_tokenizer, tmp_path / "out", text_file) == 0
    assert {path.name: path.read_bytes() for path in model_with_tokenizer.iterdir()} == before
    load_model(model_with_tokenizer)
