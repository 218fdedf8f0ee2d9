"""Graphs of whole paths: which are captured, what their layers share, and what a full device or cache leaves."""

from typing import Any

import pytest
import torch

from tests.harness.engine import Ask, Engine
from tests.harness.graph_log import SIZES, GraphLog, counted_kernels
from tests.harness.tiny_models import NUM_LAYERS, random_prompts
from vllm_buddy.method import depth_for_budget, layers_of
from vllm_buddy.method.kv_policy import MASKED
from vllm_buddy.serving.graphs.capture import OutOfGraphMemory


def test_a_path_that_recurs_is_one_graph_and_others_are_pieces(llama: Engine) -> None:
    """Fails if a recurring path is launched layer by layer, or every path that occurs once is captured."""
    llama.configure(MASKED, 0)
    graphs = llama.capture(SIZES)
    log = GraphLog(graphs)
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
    log = GraphLog(llama.capture(SIZES))
    ask = Ask((1, 2, 3), 0.5, 3)
    llama.check([ask], llama.run([ask]))
    assert len(log.steps[0]) == 2 + depth_for_budget(0.5, NUM_LAYERS)


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
    log, tries = GraphLog(graphs), []

    def full(bodies: Any) -> Any:
        tries.append(bodies)
        raise OutOfGraphMemory("no memory")

    graphs._capture = full
    ask = Ask((5, 6, 7), 0.5, 9)
    llama.check([ask], llama.run([ask]))
    assert len(tries) == 1
    assert {len(step) for step in log.steps} == {NUM_LAYERS + 2}
