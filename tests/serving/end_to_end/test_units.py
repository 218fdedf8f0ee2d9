"""KV units: the tokens are the reference's, a request at k of L layers takes k / L of the blocks, and all come back."""

from collections.abc import Callable, Iterator

import pytest

from tests.harness.engine import BLOCK_SIZE, Ask, Engine
from tests.harness.tiny_models import FAMILIES, random_prompts
from tests.serving.end_to_end.test_independence import FEW, check_scenario, scenarios
from tests.serving.end_to_end.test_preemption import batch

ROUTED = (0.5, 0.75, 0.4, 0.625)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("interval", [0, 1, 4])
def test_tokens_of_divergent_paths_equal_the_reference(
    family: str, interval: int, units_of: Callable[[str], Engine]
) -> None:
    """Fails if a layer reads or writes the blocks of another unit, or takes up one too late."""
    engine = units_of(family)
    engine.configure("masked", interval)
    asks = batch(seed=interval)
    engine.check(asks, engine.run(asks))
    assert engine.num_blocks_in_use == 0
