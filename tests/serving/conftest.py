"""Engines shared by the tests of the plugin: vLLM in this process, on tiny random models."""

import os

# Before vllm is imported: the engine core runs in this process, where tests reach its scheduler and its runner.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from collections.abc import Callable, Iterator

import pytest

from tests.harness.engine import Engine, Tiny, make_tiny, start_engine
from tests.harness.tiny_models import FAMILIES


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """Model folder, artifact and reference model of a family, made once."""
    made: dict[str, Tiny] = {}

    def get(family: str) -> Tiny:
        if family not in made:
            made[family] = make_tiny(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def engine_of(tiny: Callable[[str], Tiny]) -> Callable[[str], Engine]:
    """The routed engine of a family, started once and reset on each use."""
    started: dict[str, Engine] = {}

    def get(family: str) -> Engine:
        if family not in started:
            started[family] = start_engine(tiny(family))
        started[family].configure()
        return started[family]

    return get


@pytest.fixture(params=FAMILIES)
def engine(request: pytest.FixtureRequest, engine_of: Callable[[str], Engine]) -> Iterator[Engine]:
    """A routed engine of each family. The test leaves it idle."""
    engine = engine_of(request.param)
    yield engine
    engine.abort_all()


@pytest.fixture
def llama(engine_of: Callable[[str], Engine]) -> Iterator[Engine]:
    """The routed Llama engine. The test leaves it idle."""
    engine = engine_of("llama")
    yield engine
    engine.abort_all()


UNITS = {"kv_policy": "masked", "kv_layout": "units"}


@pytest.fixture(scope="session")
def units_of(tiny: Callable[[str], Tiny]) -> Callable[[str], Engine]:
    """The routed engine of a family with KV units of two layers, started once and reset on each use."""
    started: dict[str, Engine] = {}

    def get(family: str) -> Engine:
        if family not in started:
            started[family] = start_engine(tiny(family), buddy=UNITS)
        started[family].configure()
        return started[family]

    return get


@pytest.fixture
def units(units_of: Callable[[str], Engine]) -> Iterator[Engine]:
    """The routed Llama engine with KV units. The test leaves it idle, and no block in use."""
    engine = units_of("llama")
    yield engine
    engine.abort_all()
    assert engine.num_blocks_in_use == 0


@pytest.fixture(scope="session")
def crowded_units(tiny: Callable[[str], Tiny]) -> Engine:
    """The same with room for one request at full depth, so that vLLM preempts by itself and evicts."""
    return start_engine(tiny("llama"), buddy=UNITS, num_gpu_blocks_override=65)


@pytest.fixture(scope="session")
def crowded(tiny: Callable[[str], Tiny]) -> Engine:
    """A routed Llama engine with so few KV blocks that vLLM preempts by itself."""
    return start_engine(tiny("llama"), num_gpu_blocks_override=17)


@pytest.fixture(scope="session")
def numba() -> None:
    """Numba, with which vLLM compiles its drafter, so that engines can start in this process afterwards.

    vLLM 0.32 looks into all objects of all modules when an engine starts on CPU. One of llvmlite's takes every name for
    that of a function, `__dict__` too, and the engine ends.
    """
    from llvmlite.binding import ffi

    ffi.lib._fntab["__dict__"] = {}
