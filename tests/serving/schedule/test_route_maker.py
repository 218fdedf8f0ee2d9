"""The routes that the settings of schedules lead to."""

from collections.abc import Callable

from tests.harness.engine import Tiny
from tests.harness.tiny_models import TOKEN_DEPTHS, random_prompts
from vllm_buddy.serving.schedule.route_maker import RouteMaker
from vllm_buddy.serving.start.settings import BuddySettings

BUDGET = 0.6  # 4.8 of 8 layers: a token that runs more needs what others have saved


def depths_with(tiny: Tiny, saved_layers: int, *, lag: int = 0) -> list[int]:
    """The depth of each token of a prompt that is routed token by token."""
    schedule = {"prefill": "token", "decode": "token", "saved_layers": saved_layers}
    routes = RouteMaker.of(BuddySettings(schedule=schedule), tiny.artifact, lag)
    [prompt] = random_prompts(1, seed=4, min_tokens=200, max_tokens=200)
    runs = routes.route(BUDGET, prompt, len(prompt), None).runs(0, len(prompt), prompt)
    return [run.path.bit_count() for run in runs for _ in range(run.num_tokens)]


def test_what_tokens_save_is_what_the_setting_allows(tiny: Callable[[str], Tiny]) -> None:
    """Fails if schedule.saved_layers changes nothing: deep tokens would have too much to spend, or nothing."""
    assert set(depths_with(tiny("llama"), 0)) == {TOKEN_DEPTHS[0]}
    few, many = depths_with(tiny("llama"), 2), depths_with(tiny("llama"), 240)
    assert max(few) == TOKEN_DEPTHS[1] < max(many)  # 4.8 and the 2 that are saved are not 8
    assert sum(few) <= BUDGET * 8 * len(few)
    assert sum(many) <= BUDGET * 8 * len(many)


def test_the_lag_reaches_the_decisions_of_tokens(tiny: Callable[[str], Tiny]) -> None:
    """Fails if decisions see a token that asynchronous scheduling does not have yet."""
    assert depths_with(tiny("llama"), 240) != depths_with(tiny("llama"), 240, lag=1)
