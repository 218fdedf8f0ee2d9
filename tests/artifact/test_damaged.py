"""Artifacts with damage drawn at random, files missing or cut short, and what once was not refused in one line."""

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.fuzzing import artifacts
from vllm_buddy.artifact import CONFIG_FILE, WEIGHTS_FILE, load_artifact, resolve_artifact
from vllm_buddy.errors import ArtifactError

NUM_CASES = 250
MOST_MEMORY = 64 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    artifacts.write_sample(tmp_path / "sample")
    return tmp_path / "sample"


def refusal(folder: Path) -> str:
    """The one line with which an artifact is refused."""
    with pytest.raises(ArtifactError) as caught:
        load_artifact(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    change(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def write_header(folder: Path, header: dict[str, Any], size: int) -> None:
    """A sparse file of weights with this header and `size` bytes of zeros."""
    text = json.dumps(header).encode()
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)


def test_random_damage_is_refused_in_one_line_or_loads_as_something_that_works(tmp_path: Path) -> None:
    """Fails if damage ends in a traceback, in a message of pages, or in an artifact that breaks later."""
    assert artifacts.fuzz(NUM_CASES, tmp_path / "fuzz") > 0.7 * NUM_CASES


def test_missing_folder_and_files(folder: Path) -> None:
    """Fails if a wrong artifact folder raises anything but an error that names the missing file."""
    with pytest.raises(ArtifactError, match=f"no artifact at {folder / 'no'}: {CONFIG_FILE} is missing"):
        load_artifact(folder / "no")
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(ArtifactError, match=f"has no {WEIGHTS_FILE}"):
        load_artifact(folder)


@pytest.mark.parametrize("kept_fraction", [0.0, 0.1, 0.9])
def test_truncated_weights(folder: Path, kept_fraction: float) -> None:
    """Fails if a truncated file of weights is loaded."""
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: int(kept_fraction * len(data))])
    with pytest.raises(ArtifactError, match=r"is not a complete safetensors file .* get the artifact again"):
        load_artifact(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"format_version": ' + "9" * 5000 + "}", "\x00"])
def test_text_that_pythons_parser_chokes_on(folder: Path, text: str) -> None:
    """Fails if nesting or digits beyond Python's limits are not the user's error."""
    (folder / CONFIG_FILE).write_text(text)
    assert "is not JSON" in refusal(folder)


def test_a_configuration_of_gigabytes_is_not_read(folder: Path) -> None:
    """Fails if a huge file is read whole before it is refused."""
    with (folder / CONFIG_FILE).open("wb") as file:
        file.truncate(64 << 30)
    tracemalloc.start()
    try:
        assert "more than 16 MiB" in refusal(folder)
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("num_layers", [10**9, 10**15])
def test_a_number_of_layers_that_no_model_has(folder: Path, num_layers: int) -> None:
    """Fails if checks count up to it: the grid of the predictor was compared with a set of all depths."""
    edit(folder, lambda config: config["base_model"].update(num_layers=num_layers))
    assert re.search(r"base_model.num_layers: .* 4096 .*found 10000", refusal(folder))


def test_tensors_are_not_read_before_their_shapes_are_known(folder: Path) -> None:
    """Fails if a sparse file of terabytes makes the process allocate them."""
    edit(folder, lambda config: config["base_model"].update(vocab_size=10**7))
    header: dict[str, Any] = {}
    size = 0
    for name, width in (("decision.table_context", 10**5), ("decision.table_newest", 10**5)):
        header[name] = {"dtype": "I8", "shape": [10**7, width], "data_offsets": [size, size + 10**7 * width]}
        size += 10**7 * width
    write_header(folder, header, size)
    assert re.search(r"would take \d+.\d GiB in memory; an artifact takes at most 4", refusal(folder))


def test_a_small_part_of_the_wrong_shape_is_named_before_a_large_one_is_read(folder: Path) -> None:
    """Fails if gigabytes are read from disk, only to find that another tensor is missing."""
    edit(folder, lambda config: config.update(lora=None))
    write_header(folder, {"prior": {"dtype": "F32", "shape": [2**29], "data_offsets": [0, 2**31]}}, 2**31)
    assert "'prior' has shape (536870912,), expected (6,)" in refusal(folder)


@pytest.mark.parametrize("dtype", ["BF16", "F64", "I64", "BOOL"])
def test_a_type_that_the_format_does_not_have(folder: Path, dtype: str) -> None:
    """Fails if numpy's own error, or a silent conversion, is what comes of it."""
    width = {"BF16": 2, "F64": 8, "I64": 8, "BOOL": 1}[dtype]
    write_header(folder, {"prior": {"dtype": dtype, "shape": [6], "data_offsets": [0, 6 * width]}}, 6 * width)
    assert refusal(folder).endswith(f"tensor 'prior' is {dtype}; allowed are F32, F16, I8")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("omega", float("nan")),
        ("omega", 1e308),
        ("bypass_eps", float("inf")),
        ("budgets", [0.5, float("nan")]),
        ("name", "two\nlines"),
        ("name", "\x1b[2Jgone"),
        ("name", "x" * 10**6),
        ("format_version", -1),
    ],
)
def test_values_that_would_break_something_later(folder: Path, field: str, value: Any) -> None:
    """Fails if they reach scores, logs or terminals."""
    edit(folder, lambda config: config.update({field: value}))
    text = refusal(folder)
    assert field in text
    assert len(text) < 600
    assert text.isprintable()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "model..layers", "a b"])
def test_a_lora_of_something_that_is_no_module(folder: Path, name: str) -> None:
    """Fails if a name that leads out of the model is taken for one of its modules."""
    artifact = load_artifact(folder)
    assert artifact.lora is not None
    data = (folder / WEIGHTS_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].replace(b"model.layers.1.mlp.down_proj", name.encode()).strip()
    (folder / WEIGHTS_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert "is not the name of a module" in refusal(folder)


def test_links_lead_to_files_only(folder: Path) -> None:
    """Fails if a link as the hub's cache has them is refused, or a device or a loop is read."""
    path = folder / CONFIG_FILE
    target = path.rename(folder / "blob")
    path.symlink_to(target)
    load_artifact(folder)
    for bad in ("/dev/zero", path.name, "nowhere", "/"):
        path.unlink()
        path.symlink_to(bad)
        assert CONFIG_FILE in refusal(folder)


NOWHERE = ("a/" + "x" * 5000, "x" * 5000, "../../" + "x" * 300, "a\x00b", "", "/", "..", "a/../b")


@pytest.mark.parametrize("name", NOWHERE, ids=lambda name: ascii(name[:10]))
def test_names_of_artifacts_that_lead_nowhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a name ends in an error of the file system, or a message repeats it at length."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    if name in ("", "/", ".."):  # folders, which hold no artifact
        with pytest.raises(ArtifactError, match=r"buddy_config\.json is missing"):
            load_artifact(resolve_artifact(name, pytest.fail))
        return
    with pytest.raises(ArtifactError) as caught:
        resolve_artifact(name, pytest.fail)
    assert len(str(caught.value)) < 500


def test_a_folder_with_the_form_of_a_hub_id_is_the_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the hub is asked for what is here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    folder.rename(tmp_path / "owner" / "name")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    assert resolve_artifact("owner/name", pytest.fail) == Path("owner/name")
