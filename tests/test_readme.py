"""Tests that the generated parts of README.md and docs/ agree with the code and the results files, and of links."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tools import picture

ROOT = Path(__file__).parent.parent
MOST_LINES = 180  # of README.md: what a reader takes in before the first command is typed
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_generated_parts_are_up_to_date() -> None:
    """Fails if a setting or a result changed and the pages did not."""
    done = subprocess.run([sys.executable, "-m", "tools.readme", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"run `python -m tools.readme`. {done.stderr}"


def test_the_picture_is_up_to_date() -> None:
    """Fails if the shipped artifact routes otherwise than the picture shows."""
    assert picture.PICTURE.read_text() == picture.draw(), "run `python -m tools.picture`"


def test_the_readme_is_short() -> None:
    """Fails if the first page grows back into a manual; docs/ is the place."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Fails if a link names a file or a heading that does not exist."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs both make them for plain headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_the_example_of_a_response_has_its_keys() -> None:
    """Fails if the outcome of a request gains or loses a key and docs/serving.md does not."""
    from vllm_buddy.serving.schedule.outcome import Outcome

    text = (ROOT / "docs" / "serving.md").read_text()
    example = text.split("`kv_transfer_params.buddy`:\n\n")[1].split("\n\n")[0]
    route: Any = SimpleNamespace(lowered=False, distinct_paths=lambda: {1}, num_reroutes=0)
    told = Outcome(0.75, 22).as_dict(route)
    assert set(json.loads(example)) == set(told)
    assert set(json.loads(example)["prompt"]) == set(told["prompt"])
