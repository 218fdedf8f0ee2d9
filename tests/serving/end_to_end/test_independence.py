"""A request's tokens depend on its prompt, its budget and the settings, and on nothing that happens beside it."""

from collections.abc import Callable

import pytest
from hypothesis import settings

from tests.harness.batches import FEW, check_scenario, scenarios
from tests.harness.engine import Engine
from tests.harness.tiny_models import FAMILIES

_MANY = settings(FEW, max_examples=400)


@FEW
@scenarios
def test_tokens_do_not_depend_on_what_happens_beside_a_request(engine_of: Callable[[str], Engine], **scenario) -> None:
    """Fails if batch-mates, arrival order, chunking, cache state, preemption or aborts change a request's tokens."""
    check_scenario(engine_of("llama"), **scenario)


@FEW
@scenarios
def test_tokens_do_not_depend_on_it_when_blocks_run_out_either(crowded: Engine, **scenario) -> None:
    """The same with so few KV blocks that vLLM preempts, evicts cached blocks and gives them to others."""
    check_scenario(crowded, **scenario)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "crowded"])
def test_tokens_do_not_depend_on_it_in_many_more_scenarios(
    family: str, engine_of: Callable[[str], Engine], crowded: Engine
) -> None:
    """The same for every family, with ten times the scenarios."""
    engine = crowded if family == "crowded" else engine_of(family)

    @_MANY
    @scenarios
    def check(**scenario) -> None:  # type: ignore[no-untyped-def]
        check_scenario(engine, **scenario)

    check()
