"""Tests how an engine step is split into parts by wrapping the functions that the engine calls."""

import pytest

from benchmarks.harness.engines import Variant, decode
from benchmarks.harness.given_paths import GivenPaths
from benchmarks.speed import step_parts
from benchmarks.speed.step_parts import PARTS, REST, StepClock, instrumented, timed_at
from tests.harness.engine import Engine, make_tiny, start_engine
from tests.harness.tiny_models import NUM_LAYERS
from vllm_buddy.method import Context, PathSchedule, path_of
from vllm_buddy.serving.forward.bypasses import BypassCall
from vllm_buddy.serving.forward.eager import RoutedStep

FIRST_TOKEN = 50


class Hands:
    """A clock in ms that moves only when `work` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ms = 0.0
        monkeypatch.setattr(step_parts.time, "perf_counter", lambda: self.ms / 1e3)

    def work(self, ms: float) -> None:
        self.ms += ms


def test_time_goes_to_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if time counts twice, in a part and in a part that it calls, or not at all: parts must sum to the step."""
    hands, clock = Hands(monkeypatch), StepClock()
    layer = clock.timed("layers", lambda: hands.work(5))

    def run() -> None:
        hands.work(1)
        layer()
        hands.work(2)
        layer()

    forward = clock.timed("gather", run)

    def step() -> str:
        hands.work(10)
        forward()
        hands.work(20)
        return "outputs"

    timed = clock.step(step)
    assert (timed(), timed()) == ("outputs", "outputs")
    for parts in clock.steps:
        spent = {part: ms for part, ms in parts.items() if ms}
        assert spent == pytest.approx({"layers": 10, "gather": 3, REST: 30})


def test_time_outside_of_a_step_is_of_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the routing of a request that arrives between two steps counts as time of the next step."""
    hands, clock = Hands(monkeypatch), StepClock()
    router = clock.timed("router", lambda: hands.work(7))
    router()
    clock.step(lambda: hands.work(1))()
    router()
    assert [sum(parts.values()) for parts in clock.steps] == pytest.approx([1])


def test_a_step_that_fails_leaves_no_part_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if, after an error, all time counts as the failed part, or a step without an end is among the figures."""
    hands, clock = Hands(monkeypatch), StepClock()

    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        clock.step(clock.timed("layers", fail))()
    clock.step(lambda: hands.work(3))()
    assert len(clock.steps) == 1
    assert clock.steps[0][REST] == pytest.approx(3)


class Owner:
    def method(self) -> str:
        return "class"


def test_what_was_wrapped_is_put_back_even_after_an_error() -> None:
    """Fails if a wrapper stays on an engine, where it would slow down every later measurement."""
    on_class, owner, with_own = Owner.method, Owner(), Owner()
    with_own.method = own = lambda: "own"  # type: ignore[method-assign]
    places = [(Owner, "method", "plan"), (owner, "method", "head"), (with_own, "method", "head")]
    with pytest.raises(KeyboardInterrupt), timed_at(StepClock(), places):
        assert Owner.method is not on_class
        assert (owner.method(), with_own.method()) == ("class", "own")
        raise KeyboardInterrupt
    assert Owner.method is on_class
    assert "method" not in vars(owner)
    assert with_own.method is own


def test_a_place_that_is_gone_is_an_error_that_leaves_nothing_wrapped() -> None:
    """Fails if a method that vLLM renames makes a part silently zero, or leaves earlier places wrapped."""
    on_class = Owner.method
    with pytest.raises(AttributeError), timed_at(StepClock(), [(Owner, "method", "plan"), (Owner, "gone", "head")]):
        pass
    assert Owner.method is on_class


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A routed engine with a bypass."""
    return start_engine(make_tiny(tmp_path_factory.mktemp("llama"), "llama"), buddy={"kv_policy": "masked"})


def test_a_real_engine_has_all_parts_and_is_left_as_it_was(engine: Engine) -> None:
    """Fails if the engine does not call a wrapped place, wrappers change the tokens, or wrappers stay."""
    paths = [path_of([0, 1, 2, 7]), path_of([0, 2, 5, 7])]
    variant = Variant(
        name="tiny",
        layers=4,
        llm=engine.llm,
        budget=4 / NUM_LAYERS,
        router=GivenPaths(engine.tiny.artifact.router(), paths, FIRST_TOKEN),
        schedule=PathSchedule(interval=4),
    )
    prompts = [[FIRST_TOKEN + i, 7, 8, 9] for i in range(4)]
    plain = decode(variant, prompts, 9)
    before = _wrapped_attributes(engine)
    with instrumented(variant) as clock:
        run = decode(variant, prompts, 9)
    assert run.token_ids == plain.token_ids
    assert _wrapped_attributes(engine) == before
    steps = clock.steps[1:9]
    assert len(steps) == len(run.step_ms) == 8
    for part in PARTS:
        assert sum(parts[part] for parts in steps) > 0, part
    for parts, outside_ms in zip(steps, run.step_ms):
        assert 0 < sum(parts.values()) <= outside_ms


def _wrapped_attributes(engine: Engine) -> list[object]:
    """Return the attributes that instrumented() replaces and that can be compared."""
    runner, backbone = engine.runner, engine.runner.model.model
    own = [vars(o).keys() for o in (engine.scheduler, engine.scheduler._routes.router, runner, runner.model)]
    classes = [vars(c).copy() for c in (step_parts.Scheduler, step_parts.GPUModelRunner, Context, BypassCall)]
    routed_step = (RoutedStep.run, RoutedStep._forward_context)
    functions = (list(backbone.functions), list(backbone.bypasses))
    return [[sorted(keys) for keys in own], classes, routed_step, functions, "step" in vars(engine.llm.llm_engine)]
