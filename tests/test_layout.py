"""Tests that the names of modules in vllm_buddy tell them apart."""

from collections import defaultdict
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = [path.relative_to(ROOT / "vllm_buddy") for path in sorted((ROOT / "vllm_buddy").rglob("*.py"))]

# Names that stand in several folders outside cli/, where modules have the names of their commands, and why.
REPEATED = {
    "__init__": "Python's name",
    "base": "the interface, or the table by name, of what its folder has one file each of",
}
# Pairs that differ by one character, and why.
SIMILAR = {
    ("artifact", "artifacts"): "cli/artifacts.py has the name of its command",
    ("runner_v1", "runner_v2"): "vLLM's names of its two model runners",
    ("stage1", "stage2"): "the two stages of training",
    ("stage1_record", "stage2_record"): "the two stages of training",
    ("stage1_settings", "stage2_settings"): "the two stages of training",
}


def differ_by_one(a: str, b: str) -> bool:
    """Whether one character inserted, removed or replaced turns one name into the other."""
    short, long = sorted((a, b), key=len)
    if len(short) == len(long):
        return sum(x != y for x, y in zip(short, long)) == 1
    return any(long[:i] + long[i + 1 :] == short for i in range(len(long)))


def test_one_character_counts() -> None:
    """Fails if the measure of the tests below takes every pair, or none, for similar."""
    assert [differ_by_one("table", other) for other in ("tables", "fable", "able", "t_able")] == [True] * 4
    assert [differ_by_one("table", other) for other in ("table", "tablets", "label", "bytes")] == [False] * 4


def test_a_name_stands_once() -> None:
    """Fails if two modules outside the command line share a name: a search then finds the wrong one."""
    folders = defaultdict(list)
    for path in MODULES:
        if path.parts[0] != "cli":
            folders[path.stem].append(str(path.parent))
    assert {name: found for name, found in folders.items() if len(found) > 1 and name not in REPEATED} == {}


def test_names_differ_by_more_than_one_character() -> None:
    """Fails if two names are so alike that one is read, or typed, for the other."""
    names = sorted({path.stem for path in MODULES})
    assert [pair for pair in combinations(names, 2) if differ_by_one(*pair) and pair not in SIMILAR] == []


def test_exceptions_are_needed() -> None:
    """Fails if a module was renamed and its exception stayed, ready to hide the next one."""
    stems = [path.stem for path in MODULES if path.parts[0] != "cli"]
    assert [name for name in REPEATED if stems.count(name) < 2] == []
    assert [pair for pair in SIMILAR if not {path.stem for path in MODULES}.issuperset(pair)] == []
