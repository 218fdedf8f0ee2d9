"""Tests that the commands in README.md, CONTRIBUTING.md and docs/ exist. Nothing is run or imported."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def subcommands() -> set[str]:
    """The keys of COMMANDS in the module of the command line, which is not imported."""
    for node in ast.parse((ROOT / "vllm_buddy" / "cli" / "main.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS":
            return set(ast.literal_eval(node.value))
    raise AssertionError("vllm_buddy/cli/main.py has no COMMANDS")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def is_run_as_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return path.is_file() and '__name__ == "__main__"' in path.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_modules_exist(page: Path) -> None:
    """Fails if a page tells a reader to run a module that has moved or has no entry point."""
    named = set(re.findall(r"python -m ((?:benchmarks|tools)\.\w+(?:\.\w+)*)", page.read_text()))
    assert sorted(name for name in named if not is_run_as_module(name)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_subcommands_exist(page: Path) -> None:
    """Fails if a page names a command of `vllm-buddy` that does not exist."""
    # In code: after a backtick or at the start of an indented line, perhaps behind a path or an option of Python.
    named = set(re.findall(r"(?:`|^    )(?:[\w./-]*/)?vllm-buddy ([a-z][\w-]*)", page.read_text(), re.MULTILINE))
    named |= set(re.findall(r"-m vllm_buddy ([a-z][\w-]*)", page.read_text()))
    assert named - subcommands() == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_make_targets_exist(page: Path) -> None:
    """Fails if a page names a target of `make` that does not exist."""
    named = set(re.findall(r"(?:`|^    )make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE))
    assert named - make_targets() == set()
