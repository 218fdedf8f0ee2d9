"""Decode steps as replays, on CPU: what is captured is the code that a GPU captures, and replaying calls it again."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from vllm_buddy_kernels import Kernels

from tests.harness.batches import FEW, batch, check_scenario, scenarios
from tests.harness.engine import Ask, Engine, Tiny, start_engine
from tests.harness.tiny_models import FAMILIES, NUM_LAYERS, random_prompts
from tests.serving.conftest import UNITS
from vllm_buddy.errors import SettingsError
from vllm_buddy.method import depth_for_budget, layers_of
from vllm_buddy.method.kv_policy import KV_ONLY, MASKED
from vllm_buddy.serving.graphs.capture import OutOfGraphMemory
from vllm_buddy.serving.graphs.decode import paths_of_ranks
from vllm_buddy.serving.start.setting_sections import GraphSettings
from vllm_buddy.serving.worker import state as worker_state

SIZES = (1, 2, 4, 8)
KERNELS = "triton" if torch.cuda.is_available() else "reference"  # the references wait for the device
GOLDEN = [(policy, interval, bypass) for policy in (MASKED, KV_ONLY) for interval in (0, 4) for bypass in (False, True)]


@pytest.fixture(scope="module")
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


class Log:
    """What a step replays: each step's pieces, or its path."""

    def __init__(self, graphs: Any) -> None:
        self.steps: list[list[Any]] = []
        self.captured: list[Any] = []
        pieces, run, capture = graphs._pieces, graphs.run, graphs._capture
        graphs._pieces = {key: self._logged(key, replay) for key, replay in pieces.items()}

        def logged_run(step: Any, *inputs: Any) -> Any:
            self.steps.append([])
            return run(step, *inputs)

        def logged_capture(bodies: Any) -> Any:
            (body,) = bodies
            self.captured.append(body.args)
            (replay,), num_bytes = capture(bodies)
            return [self._logged(body.args, replay)], num_bytes

        graphs.run, graphs._capture = logged_run, logged_capture

    def _logged(self, key: Any, replay: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> None:
            self.steps[-1].append(key)
            replay()

        return call


def counted_kernels(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count what the engine calls of its kernels, until monkeypatch is undone."""
    calls: Counter[str] = Counter()

    def counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            calls[f"{name} with norm"] += name == "scatter_rows" and args[-2] is not None
            return kernel(*args)

        return call

    state, backbone = engine.state, engine.runner.model.model
    kernels = Kernels(
        **{field.name: counted(field.name, getattr(state.kernels, field.name)) for field in fields(Kernels)}
    )
    monkeypatch.setattr(state, "kernels", kernels)
    monkeypatch.setattr(state, "_moves_rows", kernels)
    if backbone.bypasses is not None:
        monkeypatch.setattr(backbone, "bypasses", [b and replace(b, kernels=kernels) for b in backbone.bypasses])
    return calls


@pytest.mark.parametrize(("policy", "interval", "bypass"), GOLDEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_replayed_steps_equal_the_reference(
    engines: Callable[[str, str], Engine], family: str, policy: str, interval: int, bypass: bool
) -> None:
    """Fails if a replay reads another step's rows, slots or lengths, or a row keeps what a skipped layer made of it."""
    engine = engines(family, KERNELS)
    asks = [Ask(ask.prompt, ask.budget, ask.max_tokens) for ask in batch(seed=interval)]
    for shares_blocks in (True, False):
        engine.configure(policy, interval, bypass=bypass)
        engine.state.policy.shares_blocks = shares_blocks
        graphs = engine.capture(SIZES)
        log = Log(graphs)
        engine.check(asks, engine.run(asks, arrivals=[0, 0, 0, 1, 2, 2, 5, 9]))
        assert len(log.steps) > 20
        assert all(log.steps)
        assert (graphs._buffers.tables is not None) == (policy == MASKED and shares_blocks)


@pytest.mark.parametrize("interval", [0, 1])
def test_tokens_of_replayed_steps_with_units_equal_the_reference(engines: Callable[..., Engine], interval: int) -> None:
    """Fails if a captured layer reads the block table of another unit, or one of the step before."""
    engine = engines("llama", KERNELS, units=True)
    engine.configure(MASKED, interval)
    log = Log(engine.capture(SIZES))
    asks = [Ask(ask.prompt, ask.budget, 40) for ask in batch(seed=interval)]
    engine.check(asks, engine.run(asks, arrivals=[0, 0, 0, 1, 2, 2, 5, 9]))
    engine.check(asks, engine.run(asks, before_step=lambda step: step == 20 and engine.preempt(0)))
    assert len(log.steps) > 60
    assert all(log.steps)
    assert engine.num_blocks_in_use == 0


def test_units_whose_tables_take_too_much_memory_are_refused_with_the_numbers(engines: Callable[..., Engine]) -> None:
    """Fails if a server with units starts whose steps would never be replayed."""
    engine = engines("llama", KERNELS, units=True)
    with pytest.raises(SettingsError, match=r"takes \d+ MiB for block tables .* graphs.memory_mib"):
        engine.capture(SIZES, memory_limit=1000)


@FEW
@scenarios
def test_replayed_steps_do_not_depend_on_what_happens_beside_a_request(
    engines: Callable[[str, str], Engine], **scenario: Any
) -> None:
    """Fails if buffers that steps share carry something from one request, or one step, to another."""

    def capture(engine: Engine) -> None:
        if engine.state.policy.in_graphs:
            engine.capture((2, 3, 8), most_paths=3)

    check_scenario(engines("llama", KERNELS), **scenario, prepare=capture)


@pytest.mark.parametrize("policy", [MASKED, KV_ONLY])
def test_tokens_of_triton_kernels_equal_the_reference(engines: Callable[[str, str], Engine], policy: str) -> None:
    """Fails if serving gives a kernel something else than its reference, or expects something else of it."""
    engine = engines("llama", "triton")
    engine.configure(policy, 4)
    asks = [Ask(ask.prompt[:24], ask.budget, 6) for ask in batch(seed=4)[:4]]  # the interpreter is slow
    engine.check(asks, engine.run(asks))
    engine.configure(policy, 0)
    engine.capture((1, 4, 8))
    engine.check(asks, engine.run(asks))


def test_rows_between_kernels_equal_the_reference(llama: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if prefill and mixed steps, which are not captured, move rows wrongly between uncompiled layers."""
    for policy in (MASKED, KV_ONLY, "zero"):
        for bypass in (False, True):
            llama.configure(policy, 4, chunk=33, bypass=bypass)
            calls = counted_kernels(llama, monkeypatch)
            asks = batch(seed=3)
            llama.check(asks, llama.run(asks))
            assert calls["gather_rows"]
            assert calls["scatter_rows"]
            assert bool(calls["bypass_rows"]) == bypass
            assert bool(calls["layer_slots"]) == (policy == MASKED)
            monkeypatch.undo()


def test_a_path_that_recurs_is_one_graph_and_others_are_pieces(llama: Engine) -> None:
    """Fails if a recurring path is launched layer by layer, or every path that occurs once is captured."""
    llama.configure(MASKED, 0)
    graphs = llama.capture(SIZES)
    log = Log(graphs)
    ask = Ask(tuple(random_prompts(1, seed=1, min_tokens=9, max_tokens=9)[0]), 0.5, 9)
    llama.check([ask], llama.run([ask]))
    path = llama.expected(ask).paths[0]
    bypassed = [layer for layer in range(NUM_LAYERS) if layer not in layers_of(path)]
    first, *_, last = log.steps
    assert [(layer, use.value) for _, (layer, use) in first[1:-1]] == [
        (layer, "none" if layer in bypassed else "all") for layer in range(NUM_LAYERS)
    ]
    assert len(log.captured) == 1
    assert len(graphs.paths) == 1
    assert len(log.steps) == 8
    assert [len(step) for step in log.steps] == [NUM_LAYERS + 2] * 2 + [1] * 6
    assert last == log.captured
    llama.check([ask], llama.run([ask]))
    assert len(log.captured) == 1, "a path in the cache is captured again"


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is replayed on a GPU calls nothing")
def test_a_path_shares_what_its_layers_have_in_common(llama: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if layers of equal lengths have metadata of their own, or the norm behind a merge is computed by itself."""
    llama.configure(MASKED, 0, bypass=False)
    calls = counted_kernels(llama, monkeypatch)
    graphs = llama.capture((4,))
    built: list[Any] = []
    monkeypatch.setattr(graphs, "_kernels", llama.state.kernels)
    monkeypatch.setattr(
        graphs, "_metadata", lambda size, index, made=graphs._metadata: built.append(index) or made(size, index)
    )
    asks = [Ask((5, 6, 7), 1.0, 9), Ask((5, 6, 7), 0.5, 9)]
    llama.check(asks, llama.run(asks))
    assert len(graphs.paths) == 1
    ((replay, _),) = graphs.paths._graphs.values()
    built.clear()
    calls.clear()
    with torch.inference_mode():
        replay()  # on what is left in the buffers
    some = NUM_LAYERS - depth_for_budget(0.5, NUM_LAYERS)
    assert len(built) == 2, "one for the layers that both run, one for those that one runs"
    assert calls["scatter_rows"] == some
    assert calls["scatter_rows with norm"] == some
    assert calls["layer_slots"] == 1
    assert not calls["gather_rows"]


def test_without_bypass_skipped_layers_are_not_launched(llama: Engine) -> None:
    """Fails if a layer that nobody runs costs a launch."""
    llama.configure(MASKED, 0, bypass=False)
    log = Log(llama.capture(SIZES))
    ask = Ask((1, 2, 3), 0.5, 3)
    llama.check([ask], llama.run([ask]))
    assert len(log.steps[0]) == 2 + depth_for_budget(0.5, NUM_LAYERS)


def test_steps_that_fit_no_graph_run_without(llama: Engine) -> None:
    """Fails if prefill or a batch larger than the largest size reaches a graph."""
    llama.configure(MASKED, 0)
    log = Log(llama.capture((1, 2)))
    asks = [Ask(ask.prompt, ask.budget, 4) for ask in batch(seed=5)[:3]]
    llama.check(asks, llama.run(asks))
    assert log.steps == []
    llama.check(asks[:2], llama.run(asks[:2]))
    assert len(log.steps) == 3  # 4 tokens each, the first of them in prefill


@pytest.mark.parametrize(("room", "replayed"), [(True, True), (False, False)])
def test_layers_behind_shared_blocks_have_tables_of_their_own_if_there_is_room(
    llama: Engine, room: bool, replayed: bool
) -> None:
    """Fails if a layer that starts behind blocks that others share reads, or writes, the shared ones."""
    llama.configure(MASKED, 1)
    prompts = random_prompts(2, seed=7, min_tokens=70, max_tokens=90)
    changing = [Ask(tuple(prompt), 0.5, 24) for prompt in prompts]
    assert all(len(set(llama.expected(ask).paths)) > 1 for ask in changing)
    graphs = llama.capture(SIZES, memory_limit=1 << 20 if room else 1)
    log = Log(graphs)
    for _ in range(2):  # the second time blocks are found in the cache
        llama.check(changing, llama.run(changing))
    assert (len(log.steps) == 2 * 23) == replayed


def test_rows_of_one_step_run_and_skip_a_layer(llama: Engine) -> None:
    """Fails if the tests above never see a layer that some rows run and others do not."""
    llama.configure(MASKED, 0)
    log = Log(llama.capture(SIZES))
    asks = [Ask((5, 6, 7), 1.0, 3), Ask((5, 6, 7), 0.5, 3), Ask((8, 9), 0.4, 3)]
    llama.check(asks, llama.run(asks))
    uses = Counter(piece[1].value for step in log.steps for _, piece in step[1:-1] if len(step) > 1)
    assert uses["some"]
    assert uses["all"]
    assert not uses["none"]
    assert {size for step in log.steps for size, *_ in step} == {4}  # padded


def test_a_full_cache_drops_the_path_not_used_for_longest(llama: Engine) -> None:
    """Fails if graphs of ever new paths take all memory of the device."""
    llama.configure(MASKED, 0)
    graphs = llama.capture(SIZES, most_paths=2)
    asks = [Ask((5, 6, 7), budget, 8) for budget in (1.0, 0.75, 0.5)]
    for ask in (*asks, asks[0]):
        llama.check([ask], llama.run([ask]))
        assert len(graphs.paths) <= 2
        assert graphs.paths.num_bytes <= 2


def test_without_memory_for_a_path_its_layers_are_replayed(llama: Engine) -> None:
    """Fails if a device that is full ends the engine in the middle of serving."""
    llama.configure(MASKED, 0)
    graphs = llama.capture(SIZES)
    log, tries = Log(graphs), []

    def full(bodies: Any) -> Any:
        tries.append(bodies)
        raise OutOfGraphMemory("no memory")

    graphs._capture = full
    ask = Ask((5, 6, 7), 0.5, 9)
    llama.check([ask], llama.run([ask]))
    assert len(tries) == 1
    assert {len(step) for step in log.steps} == {NUM_LAYERS + 2}


@pytest.mark.parametrize(("tensor_parallel_size", "captures_left"), [(1, None), (2, 400)])
def test_start_up_captures_what_the_settings_say(
    llama: Engine, monkeypatch: pytest.MonkeyPatch, tensor_parallel_size: int, captures_left: int | None
) -> None:
    """Fails if a server with graphs starts without, with others, or cannot make them anew."""
    bodies_seen: list[int] = []

    def capture(bodies: Any, warm_up: bool = False) -> Any:
        assert warm_up or len(bodies) == 1
        for body in bodies if warm_up else ():
            body()
        bodies_seen.append(len(bodies))
        return list(bodies), 1 << 20

    made: list[Any] = []
    monkeypatch.setattr(worker_state, "CudaCapture", lambda device: made.append(device) or capture)
    llama.configure(MASKED, 0)
    state = llama.state
    graphs = GraphSettings(enabled=True, sizes=(2, 8), memory_mib=64)
    monkeypatch.setattr(state, "_settings", state._settings.model_copy(update={"graphs": graphs, "kernels": KERNELS}))
    monkeypatch.setattr(state, "_capture", None)
    for _ in range(2):
        with monkeypatch.context() as ranks:
            ranks.setattr(llama.core.vllm_config.parallel_config, "tensor_parallel_size", tensor_parallel_size)
            state.start_serving(llama.runner.model.model)
        assert state.serving
        assert state.graphs.sizes == [2, 8]
        assert len(made) == 1
        assert state.graphs.paths.limit == (62 << 20) - state.graphs._buffers.tables.nbytes
        assert state.graphs.paths.captures_left == captures_left
    ask = Ask((5, 6, 7), 0.5, 9)
    llama.check([ask], llama.run([ask]))
    assert bodies_seen == [bodies_seen[0]] * 4 + [1]


def test_a_start_without_memory_for_graphs_says_what_to_do(llama: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a device that is full at start ends it in an error that names no setting."""
    llama.configure(MASKED, 0)
    graphs = GraphSettings(enabled=True, sizes=(2, 8), memory_mib=64)
    monkeypatch.setattr(llama.state, "_settings", llama.state._settings.model_copy(update={"graphs": graphs}))
    monkeypatch.setattr(llama.state, "_capture", Mock(side_effect=OutOfGraphMemory("9 MiB of device memory are free")))
    with pytest.raises(SettingsError, match=r"9 MiB of device memory are free\); give fewer graphs\.sizes"):
        llama.state.start_serving(llama.runner.model.model)


@pytest.mark.parametrize(("num_layers", "num_sizes"), [(30, 13), (64, 13), (77, 13), (80, 13), (126, 13), (126, 60)])
def test_ranks_capture_what_their_all_reduce_can_record(num_layers: int, num_sizes: int) -> None:
    """Fails if a deep model on several GPUs ends after hours, when vLLM's record of captured all-reduces is full."""
    pieces = num_sizes * (2 * 2 * (num_layers - 2) + 2 * 2 + 1)
    paths = paths_of_ranks(num_layers, num_sizes)
    assert pieces + paths * (2 * num_layers + 1) < 65_536
    assert paths == 400 or pieces + (paths + 1) * (2 * num_layers + 1) > 60_000
    with pytest.raises(SettingsError, match=r"fewer graphs\.sizes"):
        paths_of_ranks(126, 200)


def test_stale_buffers_do_not_reach_padded_rows_slots(llama: Engine) -> None:
    """Fails if rows that pad a step write K and V where an earlier step of that size wrote."""
    llama.configure(MASKED, 0)
    graphs = llama.capture((8,))
    asks = batch(seed=6)
    llama.check(asks, llama.run(asks))
    few = [Ask(asks[0].prompt, 0.5, 5), Ask(asks[1].prompt, 0.75, 5)]
    llama.check(few, llama.run(few))
    slots, lengths = graphs._buffers.slots(8), graphs._buffers.lengths(8)
    assert (slots[:, 2:] == -1).all()
    assert (lengths[:, 2:] == 1).all()
    assert torch.equal((slots[:, :2] >= 0), graphs._buffers.plan(8)[1][:, :2] >= 0)
