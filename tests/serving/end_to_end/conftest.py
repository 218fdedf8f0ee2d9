"""Engines with the lossless drafter, and a pace at which they draft."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.harness.engine import Engine, Tiny
from tests.harness.lossless import start_lossless
from vllm_buddy.serving.schedule.draft_pace import Drafting


@pytest.fixture(scope="session")
def lossless_of(tiny: Callable[[str], Tiny]) -> Callable[..., Engine]:
    """The routed engine with the lossless drafter of a family, with a refining pass or without, started once."""
    started: dict[Any, Engine] = {}

    def get(family: str, *, refined: bool = False) -> Engine:
        if (family, refined) not in started:
            started[family, refined] = start_lossless(
                tiny(family), **({"depth": 4, "refine_depth": 7} if refined else {})
            )
        return started[family, refined]

    return get


@pytest.fixture(params=["llama", "qwen2", "qwen3", "llama-refined"])
def lossless(request: pytest.FixtureRequest, lossless_of: Callable[..., Engine]) -> Iterator[Engine]:
    family, _, refined = request.param.partition("-")
    engine = lossless_of(family, refined=bool(refined))
    yield engine
    engine.abort_all()


@pytest.fixture
def always_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models reject nearly all drafts, so that a real pace would make none."""
    monkeypatch.setattr(Drafting, "_num_passes", lambda *_: 3)
