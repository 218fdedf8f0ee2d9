"""Tests of tools/vllm_suite.py, which runs vLLM's own tests: the selection, the switch, the hub, and the results."""

import hashlib
import json
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from tools.suite import environment, hub, running, sdist, selection, switch
from tools.suite.environment import MODES, STOCK
from tools.tables import vllm_tests
from tools.tables.results import load_rows
from vllm_buddy.models.embedded import MODEL_FILES
from vllm_buddy.serving.compat import TESTED_VLLM

CHOSEN = selection.load()
FILES = {file.path: file for file in CHOSEN.files}
ROWS = load_rows(vllm_tests.RESULTS_FILE)


def test_each_file_is_chosen_once_and_for_the_newest_vllm() -> None:
    """Fails if a file is listed twice, so that one run overwrites the other, or the tests are of another vLLM."""
    assert [path for path, count in Counter(file.path for file in CHOSEN.files).items() if count > 1] == []
    assert CHOSEN.vllm == TESTED_VLLM[-1]
    assert all(path.endswith(".py") and not path.startswith("tests/") for path in FILES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['file']}, {row['mode']}")
def test_results_are_of_the_selection(row: dict) -> None:
    """Fails if there are results of a file that is no longer run, or of one that started stock engines by mistake."""
    file = FILES[row["file"]]
    assert row["mode"] in file.modes
    if row["mode"] == STOCK:
        assert row["engines"] == 0
    elif file.engine and row["passed"]:
        assert row["engines"] > 0


def test_each_difference_is_explained_and_each_explanation_needed() -> None:
    """Fails if a test fails with routing only and nobody said why, or what was said no longer holds for any test."""
    by_key = {(row["file"], row["mode"]): row for row in ROWS}
    unexplained, used = [], set()
    for (path, mode), row in by_key.items():
        for test in [] if mode == STOCK else vllm_tests.new_failures(by_key.get((path, STOCK)), row):
            found = [remark for remark in FILES[path].differences if remark.covers(test)]
            used.update((path, remark.test) for remark in found)
            unexplained += [] if found else [(path, mode, test)]
    assert unexplained == []
    assert {(path, remark.test) for path, file in FILES.items() for remark in file.differences} == used


def test_budgets_below_one_are_left_out_where_they_mean_nothing() -> None:
    """Fails if a file that starts no engine, or that compares with the full model's outputs, runs at budget 0.5."""
    assert selection.TestFile(path="a.py").modes == (STOCK, "1.0")
    assert selection.TestFile(path="a.py", engine=True, needs_weights=True).modes == (STOCK, "1.0")
    assert selection.TestFile(path="a.py", engine=True).modes == MODES


def test_only_engines_that_name_no_implementation_are_switched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a test's engine stays a stock one, another plugin's options are lost, or stock runs are routed too."""
    from vllm.engine.arg_utils import EngineArgs

    def create(self: object) -> SimpleNamespace:
        return SimpleNamespace(model_config=SimpleNamespace(model_impl=self.model_impl, architecture="A"))

    report = tmp_path / "report.jsonl"
    monkeypatch.setenv("VLLM_SUITE_REPORT", str(report))
    monkeypatch.setattr(EngineArgs, "create_engine_config", create)
    monkeypatch.delenv(switch.BUDGET_VARIABLE, raising=False)
    switch.register()
    assert EngineArgs.create_engine_config is create
    monkeypatch.setenv(switch.BUDGET_VARIABLE, "0.5")
    switch.register()
    switch.register()
    args = SimpleNamespace(model_impl="auto", additional_config={"other": 1})
    EngineArgs.create_engine_config(args)
    assert args.model_impl == "buddy"
    assert args.additional_config["buddy"]["default_budget"] == 0.5
    assert args.additional_config["other"] == 1
    EngineArgs.create_engine_config(SimpleNamespace(model_impl="transformers", additional_config={}))
    assert report.read_text().splitlines() == ['{"engine": "A"}']


def test_stock_runs_load_no_plugin_of_this_project(tmp_path: Path) -> None:
    """Fails if what counts as stock vLLM has this plugin's patches in it."""
    stock, routed = (
        environment.variables(mode, folder=tmp_path, hub=tmp_path, report=tmp_path / "r") for mode in (STOCK, "0.5")
    )
    assert "buddy" not in stock["VLLM_PLUGINS"]
    assert switch.BUDGET_VARIABLE not in stock
    assert "VLLM_PLUGINS" not in routed or routed["VLLM_PLUGINS"] != stock["VLLM_PLUGINS"]
    assert routed[switch.BUDGET_VARIABLE] == "0.5"


def test_only_what_tests_read_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if another archive than PyPI's is taken, or vLLM's sources come along, to be imported instead of vLLM."""
    source = tmp_path / "vllm-9.9"
    for name in ("tests/test_a.py", "vllm/__init__.py", "setup.py", "pyproject.toml"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    archive = tmp_path / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, arcname=source.name)
    entry = {"url": archive.as_uri(), "hashes": {"sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}}
    monkeypatch.setattr(sdist, "_entry", lambda _name: entry)
    folder = sdist.fetch("9.9", tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == ["pyproject.toml", "tests"]
    assert (folder / "tests" / "test_a.py").is_file()
    entry["hashes"] = {"sha256": "0" * 64}
    with pytest.raises(SystemExit, match="PyPI says 0000"):
        sdist.fetch("9.9", tmp_path / "other")


def test_every_model_is_the_embedded_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a name in a test leads to no model, or an adapter does not fit the model."""
    model = tmp_path / "model"
    model.mkdir()
    config = {"hidden_size": 6, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 2}
    for name in MODEL_FILES:
        (model / name).write_text(json.dumps(config))
    monkeypatch.setattr(hub, "fetch", lambda: model)
    source = tmp_path / "test_a.py"
    source.write_text('MODEL = "some-owner/Some-Model.1"\nADAPTER = "owner/lora"\n')
    for _ in range(2):  # what is there is kept
        hub.make(tmp_path / "hub", [source], ["owner/lora"])
    found = {path.parent.parent.name: path for path in (tmp_path / "hub" / "hub").glob("*/snapshots/*")}
    assert {file.name for file in found["models--some-owner--Some-Model.1"].iterdir()} == set(MODEL_FILES)
    tensors = load_file(found["models--owner--lora"] / "adapter_model.safetensors")
    shapes = {name.split("self_attn.")[1]: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes["v_proj.lora_A.weight"] == (8, 6)
    assert shapes["v_proj.lora_B.weight"] == (2, 8)
    assert len(tensors) == 2 * 2 * 2


def test_a_run_that_is_cut_short_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run that hangs ends the tool, or loses the outcomes that were there, or has more than these."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_a.py").write_text(
        "import signal, sys, time\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_left(): pass\n"
        "def test_slow():\n    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n    time.sleep(60)\n"
        "def test_after(): assert 1 == 3\n"
    )
    packages = tmp_path / "packages"
    packages.mkdir()
    text = (Path(environment.__file__).parent / "report.py").read_text()
    start = text.index("def pytest_sessionstart")
    # without vLLM, whose import takes longer than all else here
    (packages / "vllm_suite_report.py").write_text(text[:start] + text[text.index("def pytest_runtest_logreport") :])
    left = selection.Remark(test="test_left", reason="only to see it left out")
    file = selection.TestFile(path="test_a.py", deselected=(left,))
    (row,) = running.run(
        [file], "1.0", tests=tmp_path, folder=packages, hub=tmp_path, log=tmp_path / "log", limit_s=15.0
    )
    assert row["passed"] == 1
    assert row["failed"] == {"test_bad": "assert 1 == 2"}
    assert row["skipped"] == {}
    assert not row["finished"]
