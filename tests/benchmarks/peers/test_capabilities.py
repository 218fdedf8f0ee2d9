"""Tests the list of capabilities: each entry has a value and a source that exists."""

from pathlib import Path

import pytest

from benchmarks.peers import capabilities
from benchmarks.peers.capabilities import BUDDY, CAPABILITIES, ECONOMIZE, NGRAM, PRUNED

ROOT = Path(__file__).parents[3]
FOLDERS = ("tests/", "docs/", "vllm_buddy/", "README.md")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_is_said_of_one_system_only(capability: str) -> None:
    """Fails if a weakness or strength is listed for some systems and missing for others."""
    assert list(CAPABILITIES[capability]) == [BUDDY, NGRAM, PRUNED, ECONOMIZE]


def test_both_sides_have_what_they_cannot_do() -> None:
    """Fails if the list turns into an advertisement."""
    for system in (BUDDY, ECONOMIZE):
        assert any(systems[system].value == "no" for systems in CAPABILITIES.values())


def test_files_that_claims_point_to_exist() -> None:
    """Fails if a test or document that a claim rests on is gone."""
    for systems in CAPABILITIES.values():
        for known in systems.values():
            path = known.where.split(":")[0]
            if path.startswith(FOLDERS):
                assert (ROOT / path).exists(), known
            assert known.how != "test" or path.startswith("tests/"), known


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ("mixture-of-experts models", "a mixture-of-experts model"),
    ],
)
def test_what_buddy_refuses_is_said_to_be_refused(capability: str, reason: str) -> None:
    """Fails if a feature starts to work, or stops being refused, and the table does not follow."""
    from vllm_buddy.serving.start.refusals import _CHECKS

    assert reason in {name for name, _, _ in _CHECKS}
    assert CAPABILITIES[capability][BUDDY].value == "no"
    assert "refused" in CAPABILITIES[capability][BUDDY].where


def test_rows_are_tidy() -> None:
    """Fails if a row lacks what a table needs, or is mistaken for a figure."""
    rows = capabilities.rows()
    assert {row["metric"] for row in rows} == {"can", "cannot"}
    for row in rows:
        wanted = {"capability", "value", "how", "where"} if row["metric"] == "can" else {"reason"}
        assert set(row) == {"metric", "variant"} | wanted
