"""Engines that move rows by kernels, as graphs need them."""

from collections.abc import Callable, Iterator

import pytest

from tests.harness.engine import Engine, Tiny, start_engine
from tests.harness.graph_log import KERNELS
from tests.serving.conftest import UNITS


@pytest.fixture(scope="session")
def engines(tiny: Callable[[str], Tiny]) -> Callable[[str, str], Engine]:
    """Engines that move rows by kernels, by family and kernels."""
    started: dict[tuple[str, str, bool], Engine] = {}

    def get(family: str, kernels: str, *, units: bool = False) -> Engine:
        key = (family, kernels, units)
        if key not in started:
            started[key] = start_engine(tiny(family), buddy={"kernels": kernels, **(UNITS if units else {})})
        started[key].configure()
        return started[key]

    return get


@pytest.fixture
def llama(engines: Callable[[str, str], Engine]) -> Iterator[Engine]:
    engine = engines("llama", KERNELS)
    yield engine
    engine.abort_all()
