"""The entry point of the command line: which command runs, and how mistakes are reported."""

import argparse
import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vllm_buddy.cli import main
from vllm_buddy.cli.main import COMMANDS
from vllm_buddy.errors import BudgetError


def fake_command(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None, status: int = 0) -> None:
    def run(args: argparse.Namespace) -> int:
        if error is not None:
            raise error
        return status

    module = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    # By its full name, because the attribute `main` of the package is the function.
    monkeypatch.setattr(importlib.import_module("vllm_buddy.cli.main"), "_module", lambda command: module)


def test_no_command_prints_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a script that forgets the command gets exit status 0."""
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


def test_unknown_command_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a mistyped command is not answered with the known commands."""
    with pytest.raises(SystemExit) as stopped:
        main(["doktor"])
    assert stopped.value.code == 2
    assert "doctor" in capsys.readouterr().err


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "serve"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the module of a command cannot be imported."""
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"vllm-buddy {command}" in capsys.readouterr().out


def test_user_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a user's mistake ends in a traceback."""
    fake_command(monkeypatch, BudgetError("budget is 7; allowed is a number in (0, 1]"))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "vllm-buddy: error: budget is 7; allowed is a number in (0, 1]\n"


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an interrupted command does not end with status 130, which shells expect."""
    fake_command(monkeypatch, KeyboardInterrupt())
    assert main(["demo"]) == 130


def test_programming_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a bug is reported as a user's mistake, without a traceback."""
    fake_command(monkeypatch, ValueError("bug"))
    with pytest.raises(ValueError, match="bug"):
        main(["doctor"])


def test_status_of_the_command_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if `make demo` succeeds although the demo's checks fail."""
    fake_command(monkeypatch, status=1)
    assert main(["doctor"]) == 1


def test_help_loads_no_http_client() -> None:
    """Fails if the help waits for libraries that one command needs."""
    code = (
        "import sys\nfrom vllm_buddy.cli import main\n"
        "try: main(['demo', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(' '.join({'openai', 'httpx'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""
