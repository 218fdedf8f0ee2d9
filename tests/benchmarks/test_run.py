"""Tests benchmarks.run: it names the benchmarks that fail, and still runs the others."""

from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.harness.result_rows import RESULTS_DIR

SCRIPTS = {
    "good": "print('figures')",
    "refused": "from benchmarks.harness.rounds import Refused; raise Refused('why')",
    "broken": "raise ValueError('broken')",
    "last": "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()",
}


@pytest.fixture
def ran_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces the benchmarks by scripts. The last script writes the returned file."""
    for name, code in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    commands = {name: [name, str(tmp_path / "ran")] for name in SCRIPTS}
    monkeypatch.setattr(run, "commands", lambda full, out: commands)
    return tmp_path / "ran"


def test_what_fails_is_said_and_the_others_run(
    ran_last: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fails if refused figures go unnoticed in a long run, or end it."""
    monkeypatch.setattr("sys.argv", ["run.py"])
    assert run.main() == 1
    assert ran_last.exists()
    assert capfd.readouterr().out.splitlines()[-1].endswith("refused or failed: refused, broken")


def test_success_is_said_as_success(
    ran_last: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fails if a run without a failure ends with status 1, or --only runs other benchmarks too."""
    monkeypatch.setattr("sys.argv", ["run.py", "--only", "good", "last"])
    assert run.main() == 0
    assert ran_last.exists()
    out = capfd.readouterr().out
    assert "broken" not in out
    assert "refused or failed" not in out


@pytest.mark.parametrize("full", [False, True])
def test_commands_name_modules_that_exist(full: bool, tmp_path: Path) -> None:
    """Fails if a benchmark was renamed, or its results are written to another folder than asked."""
    for module, *options in run.commands(full, tmp_path).values():
        assert (run.ROOT / f"{module.replace('.', '/')}.py").is_file()
        assert any(option.startswith(str(tmp_path)) for option in options)
    assert set(run.commands(False, tmp_path)) < set(run.commands(True, RESULTS_DIR))
