"""How many drafts a request gets, and on which layers they are made."""

from collections.abc import Callable

import pytest

from tests.harness.engine import Tiny
from vllm_buddy.errors import SettingsError
from vllm_buddy.method import layers_of
from vllm_buddy.serving.schedule.draft_pace import PROBE_EVERY, DraftPace, DraftPath
from vllm_buddy.serving.start.settings import BuddySettings, DraftSettings


def after(pace: DraftPace, num_steps: int, share_right: float) -> list[int]:
    """The numbers of drafts in the last 200 steps of num_steps, of which a share is right."""
    numbers, debt = [], 0.0
    for _ in range(num_steps):
        wanted = pace.num_drafts(1)
        numbers.append(wanted)
        accepted = 0
        while accepted < wanted and (debt := debt + share_right) >= 1.0:
            debt -= 1.0
            accepted += 1
        if wanted:
            pace.observe(wanted, accepted)
    return numbers[-200:]


def test_drafts_that_are_right_become_more_and_wrong_ones_cease() -> None:
    """Fails if a request goes on paying for drafts that are rejected, or cheap right ones are not used."""
    assert set(after(DraftPace(4, 0.7, 0.02, cost=0.1), 400, 1.0)) == {4}
    rare = after(DraftPace(4, 0.7, 0.02, cost=0.5), 400, 0.0)
    assert set(rare) == {0, 1}
    assert sum(rare) <= 200 / PROBE_EVERY + 1


def test_what_does_not_pay_is_tried_rarely_so_that_it_costs_little() -> None:
    """Fails if trying costs more than 3% where no draft is ever right."""
    pace = DraftPace(4, 0.7, 0.02, cost=0.55)
    tried = after(pace, 1000, 0.0)
    assert sum(tried) * 0.57 / len(tried) < 0.03


def test_text_that_changes_brings_drafts_back() -> None:
    """Fails if a request that once rejected all drafts never gets any again."""
    pace = DraftPace(3, 0.7, 0.02, cost=0.2)
    after(pace, 300, 0.0)
    assert max(after(pace, 1200, 1.0)) == 3


def test_large_batches_get_fewer_drafts() -> None:
    """Fails if drafts whose rows cost more than they bring are made because they paid for one request."""
    few, many = DraftPace(5, 0.5, 0.02), DraftPace(5, 0.5, 0.02)
    assert few.num_drafts(1) > many.num_drafts(16) >= 0
    assert DraftPace(5, 0.5, 0.02).num_drafts(256) == 0


def test_the_draft_path_is_the_artifacts(tiny: Callable[[str], Tiny]) -> None:
    """Fails if drafts run other layers than was asked for, or a depth that there is no path of is not refused."""
    made = tiny("llama")
    config = made.model.config
    drafts = DraftPath.of(BuddySettings(drafts=DraftSettings(depth=4, refine_depth=6)), made.artifact, config)
    library = made.artifact.config.library
    assert library is not None
    assert layers_of(drafts.path) == library[4][0]
    assert drafts.refined is not None
    assert layers_of(drafts.refined) == library[6][0]
    assert 0 < drafts.cost < drafts.refine_cost < 1
    for wrong in (
        DraftSettings(depth=2),
        DraftSettings(depth=8),
        DraftSettings(depth=4, refine_depth=4),
        DraftSettings(depth=4, refine_depth=8),
    ):
        with pytest.raises(SettingsError, match="drafts"):
            DraftPath.of(BuddySettings(drafts=wrong), made.artifact, config)
