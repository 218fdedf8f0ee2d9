"""Tests that docs/architecture.md lists every module and names only files and functions that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("vllm_buddy", "kernels/vllm_buddy_kernels")
MOST_COLUMNS = 120

# A file and the names after it, as in `serving/admission/options.py`, `verify_options`.
NAMES_IN_FILE = re.compile(r"`([\w/]+\.py)`((?:,\s+`[\w.]+`)+)")


def section(heading: str) -> str:
    """The text under a heading of the second level."""
    return PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def path_of(name: str) -> str:
    """The path that the page calls `name`, from the root of the repository."""
    return name if (ROOT / name.split("/")[0]).is_dir() else f"vllm_buddy/{name}"


@cache
def names_of(path: str) -> set[str]:
    """Functions, classes and constants of a file; methods and attributes as `Class.name`."""
    found: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found.add(prefix + node.name)
                collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(prefix + node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    collect(ast.parse((ROOT / path).read_text()).body, "")
    return found


def test_every_module_is_listed_once() -> None:
    """Fails if a module is missing from "Where to look", stands there twice, or is gone from the tree."""
    text = section("Where to look")
    listed = [path_of(name) for name in re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE)]
    listed += [f"{path_of(folder)}/__init__.py" for folder in re.findall(r"^### `([\w/]+)/`$", text, re.MULTILINE)]
    modules = [str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert sorted(listed) == sorted(modules)


@pytest.mark.parametrize("page", [PAGE, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    """Fails if a page sends a reader to a file that has moved."""
    named = {path_of(name) for name in re.findall(r"`([\w/-]+\.(?:py|md|json))`", page.read_text()) if "/" in name}
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []


def test_every_function_is_where_the_page_says() -> None:
    """Fails if a function is renamed or moved to another file and the page still sends a reader to the old one."""
    missing = []
    for file, names in NAMES_IN_FILE.findall(PAGE.read_text()):
        wanted = set(re.findall(r"`([\w.]+)`", names))
        missing += [f"{file}: {name}" for name in sorted(wanted - names_of(path_of(file)))]
    assert missing == []


def test_every_step_of_a_request_names_a_file_and_a_function() -> None:
    """Fails if a step of "One request" says what happens and not where, or the steps are not numbered 1 to N."""
    request = section("One request, step by step").split("**A bad budget**")[0]
    _, *parts = re.split(r"^(\d+)\. ", request, flags=re.MULTILINE)
    numbers, steps = [int(number) for number in parts[::2]], parts[1::2]
    assert numbers == list(range(1, len(steps) + 1))
    assert [n for n, step in zip(numbers, steps) if not NAMES_IN_FILE.search(step)] == []


def test_lines_fit() -> None:
    """Fails if a line of prose is longer than the lines of the code."""
    text = re.sub(r"^```.*?^```$", "", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in text.splitlines() if len(line) > MOST_COLUMNS and not line.startswith("|")] == []
