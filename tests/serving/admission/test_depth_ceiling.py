"""From a level to the greatest depth that requests share."""

import pytest

from vllm_buddy.serving.admission.depth_ceiling import DepthCeiling

DEPTHS = (15, 18, 22, 26, 30)


def ceiling(*recent: int) -> DepthCeiling:
    made = DepthCeiling(DEPTHS)
    for depth in recent:
        made.add(depth)
    return made


@pytest.mark.parametrize(
    ("level", "depth"),
    [(0.0, 30), (0.05, 30), (0.2, 26), (0.5, 22), (0.65, 22), (0.68, 18), (0.89, 18), (0.9, 15), (1.0, 15)],
)
def test_the_scale_is_linear_in_layers(level: float, depth: int) -> None:
    """Fails if a level leaves far more or fewer layers than it asks for, or one late token lowers requests."""
    made = ceiling()
    made.follow(level)
    assert made.depth == depth


def test_the_scale_begins_where_recent_prompts_are() -> None:
    """Fails if a server whose requests are shallow without load has to be late for long before anything changes."""
    made = ceiling(18, 22)
    assert made.depth == 30
    made.follow(0.5)
    assert made.depth == 18
    made.add(30)  # from the next request on
    assert made.depth == 22


def test_only_recent_prompts_count() -> None:
    """Fails if one deep request of yesterday decides where the scale begins today."""
    made = ceiling(30, *[18] * 64)
    made.follow(0.6)
    assert made.depth == 15


def test_fewest_layers_everywhere() -> None:
    """Fails if prompts that all choose the fewest layers leave no ceiling."""
    made = ceiling(15)
    made.follow(0.5)
    assert made.depth == 15
