"""Settings of a server decide what its requests run: read from the settings, not put in place by a test."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.harness.engine import Ask, Tiny
from tests.harness.pretend_worker import PretendEngine
from tests.harness.tiny_models import NUM_LAYERS
from vllm_buddy.method import PathSchedule
from vllm_buddy.serving.schedule.plan import PLAN_ATTRIBUTE

PROMPT = tuple(range(20, 60))


def depths_of_first_step(tiny: Tiny, buddy: dict[str, Any], ask: Ask) -> tuple[set[int], int]:
    """Layers that the tokens of a prompt run, and that decoded tokens will run."""
    engine = PretendEngine(tiny, PathSchedule(0), asynchronous=False, num_blocks=50, chunk=64, buddy=buddy)
    request = engine.request(ask)
    engine.scheduler.add_request(request)
    plan = getattr(engine.scheduler.schedule(), PLAN_ATTRIBUTE)[request.request_id]
    return {run.path.bit_count() for run in plan.runs}, engine.scheduler._routed[request.request_id].route.depth


@pytest.mark.parametrize(
    ("buddy", "options", "in_prompt", "decoded"),
    [
        ({}, {}, NUM_LAYERS // 2, NUM_LAYERS // 2),
        ({"prompt": "full"}, {}, NUM_LAYERS, NUM_LAYERS // 2),
        ({"prompt": "full"}, {"buddy_prompt": "routed"}, NUM_LAYERS // 2, NUM_LAYERS // 2),
        ({"prompt": "routed"}, {"buddy_prompt": "full"}, NUM_LAYERS, NUM_LAYERS // 2),
    ],
)
def test_how_prompts_run(
    tiny: Callable[[str], Tiny], buddy: dict[str, Any], options: dict[str, Any], in_prompt: int, decoded: int
) -> None:
    """Fails if the setting is not read, or a request's own option does not count more."""
    found = depths_of_first_step(tiny("llama"), buddy, Ask(PROMPT, 0.5, 4, options=options))
    assert found == ({in_prompt}, decoded)


@pytest.mark.parametrize(("default", "depth"), [(1.0, NUM_LAYERS), (0.5, NUM_LAYERS // 2)])
def test_what_a_request_without_a_budget_runs(tiny: Callable[[str], Tiny], default: float, depth: int) -> None:
    """Fails if default_budget is not read."""
    assert depths_of_first_step(tiny("llama"), {"default_budget": default}, Ask(PROMPT, None, 4)) == ({depth}, depth)
