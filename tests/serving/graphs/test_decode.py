"""Decode steps as replays, on CPU: what is captured is the code that a GPU captures, and replaying calls it again."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.harness.batches import FEW, batch, check_scenario, scenarios
from tests.harness.engine import Ask, Engine
from tests.harness.graph_log import KERNELS, SIZES, GraphLog, counted_kernels
from tests.harness.tiny_models import FAMILIES, random_prompts
from vllm_buddy.method.kv_policy import KV_ONLY, MASKED

GOLDEN = [(policy, interval, bypass) for policy in (MASKED, KV_ONLY) for interval in (0, 4) for bypass in (False, True)]


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
        log = GraphLog(graphs)
        engine.check(asks, engine.run(asks, arrivals=[0, 0, 0, 1, 2, 2, 5, 9]))
        assert len(log.steps) > 20
        assert all(log.steps)
        assert (graphs._buffers.tables is not None) == (policy == MASKED and shares_blocks)


@pytest.mark.parametrize("interval", [0, 1])
def test_tokens_of_replayed_steps_with_units_equal_the_reference(engines: Callable[..., Engine], interval: int) -> None:
    """Fails if a captured layer reads the block table of another unit, or one of the step before."""
    engine = engines("llama", KERNELS, units=True)
    engine.configure(MASKED, interval)
    log = GraphLog(engine.capture(SIZES))
    asks = [Ask(ask.prompt, ask.budget, 40) for ask in batch(seed=interval)]
    engine.check(asks, engine.run(asks, arrivals=[0, 0, 0, 1, 2, 2, 5, 9]))
    engine.check(asks, engine.run(asks, before_step=lambda step: step == 20 and engine.preempt(0)))
    assert len(log.steps) > 60
    assert all(log.steps)
    assert engine.num_blocks_in_use == 0


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


def test_steps_that_fit_no_graph_run_without(llama: Engine) -> None:
    """Fails if prefill or a batch larger than the largest size reaches a graph."""
    llama.configure(MASKED, 0)
    log = GraphLog(llama.capture((1, 2)))
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
    log = GraphLog(graphs)
    for _ in range(2):  # the second time blocks are found in the cache
        llama.check(changing, llama.run(changing))
    assert (len(log.steps) == 2 * 23) == replayed


def test_rows_of_one_step_run_and_skip_a_layer(llama: Engine) -> None:
    """Fails if the tests above never see a layer that some rows run and others do not."""
    llama.configure(MASKED, 0)
    log = GraphLog(llama.capture(SIZES))
    asks = [Ask((5, 6, 7), 1.0, 3), Ask((5, 6, 7), 0.5, 3), Ask((8, 9), 0.4, 3)]
    llama.check(asks, llama.run(asks))
    uses = Counter(piece[1].value for step in log.steps for _, piece in step[1:-1] if len(step) > 1)
    assert uses["some"]
    assert uses["all"]
    assert not uses["none"]
    assert {size for step in log.steps for size, *_ in step} == {4}  # padded


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
