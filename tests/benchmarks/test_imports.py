"""Every module of benchmarks/ and tools/ can be imported, and every command explains itself."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Not installed everywhere: a module that needs one of them is skipped without it.
OPTIONAL = ("matplotlib", "prometheus_client", "transformers", "triton", "vllm")
# The environment is made before anything can be imported, so this one runs as a script.
SCRIPT = "tools.setup_env"


def module_names() -> list[str]:
    paths = [path for room in ("benchmarks", "tools") for path in sorted((ROOT / room).rglob("*.py"))]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    return [name.removesuffix(".__init__") for name in names]


def is_command(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return path.is_file() and '__name__ == "__main__"' in path.read_text()


MODULES = module_names()
COMMANDS = [name for name in MODULES if is_command(name) and name != SCRIPT]


def imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in OPTIONAL:
            pytest.skip(f"needs {missing}")
        raise


@pytest.mark.parametrize("name", MODULES)
def test_it_can_be_imported(name: str) -> None:
    """Fails if a module moved and another one still imports it from where it was."""
    imported(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_command(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if `--help` starts a measurement, ends in a traceback, or shows a command that does not exist."""
    module = imported(name)
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m {name} ")
    assert f"\n    python -m {name}" in said, "there is no example"
    assert set(re.findall(r"python -m ((?:benchmarks|tools)\.[\w.]+)", said)) <= set(COMMANDS)
