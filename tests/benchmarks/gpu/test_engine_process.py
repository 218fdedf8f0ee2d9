"""Tests the process of one engine: which runs fit, on which prompts, and how it turns graphs and bypass off."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_buddy_kernels import KERNELS

from benchmarks.gpu import engine_process
from benchmarks.gpu.engine_job import check_prompts, tokens_per_request, why_left_out, windows


def test_a_run_is_left_out_where_its_cache_does_not_fit() -> None:
    """Fails if requests are preempted while they are timed, or runs are left out that would fit."""
    kv = {"max_model_len": 131072, "block_size": 16, "num_blocks": 1000}
    assert why_left_out(10, 1024, 256, **kv) is None  # 800 blocks
    assert "fit" not in (why_left_out(12, 1024, 256, **kv) or "")  # 960 blocks
    why = why_left_out(13, 1024, 256, **kv)  # 1040
    assert why is not None
    assert "16640 tokens of KV cache" in why
    why = why_left_out(1, 1024, 256, **{**kv, "max_model_len": 1279})
    assert why is not None
    assert "1279 positions" in why


def test_early_requests_have_tokens_left_when_the_last_prompt_is_read() -> None:
    """Fails if a request ends before the batch is whole, so that steps of fewer rows are timed."""
    # 32 prompts of 8192 tokens, 16384 at most in a step: at least 16 steps in which the first request decodes.
    assert tokens_per_request(100, 32, 8192, 16384) >= 100 + 17
    assert tokens_per_request(100, 1, 10, 16384) >= 102


def test_check_prompts_are_the_same_everywhere_and_reach_the_longest_context() -> None:
    """Fails if engines are compared on different prompts, or never on as many tokens as are timed."""
    prompts = check_prompts(1000, 8, 900)
    assert prompts == check_prompts(1000, 8, 900)
    assert len(prompts) == 8
    assert max(map(len, prompts)) == 900
    assert all(100 <= token < 1000 for prompt in prompts for token in prompt)
    assert [len(prompt) for prompt in check_prompts(1000, 1, 900)] == [900]


def test_windows_are_the_time_between_stamps() -> None:
    """Fails if a repeat has the time or the routing of another one."""
    seconds, shares = windows([(10.0, 1.0), (12.0, 1.5), (16.0, 1.5)])
    assert seconds == [2.0, 4.0]
    assert shares == [0.25, 0.0]


@dataclass(frozen=True)
class StubBypass:
    kernels: Any


class StubState:
    """Stands in for the part of WorkerState that TimedEngine uses."""

    def __init__(self) -> None:
        self.graphs: Any = "old graphs"
        self.kernels: Any = "triton"
        self._moves_rows: Any = "triton"

    def capture_graphs(self, backbone: Any) -> None:
        self.graphs = "new graphs"


def stub_engine() -> Any:
    engine: Any = object.__new__(engine_process.TimedEngine)
    backbone = SimpleNamespace(bypasses=[None, StubBypass("triton"), None])
    engine.runner = SimpleNamespace(buddy_state=StubState(), model=SimpleNamespace(model=backbone))
    return engine


def test_the_eager_form_uses_no_graph_and_no_kernel() -> None:
    """Fails if outputs of graphs are compared with outputs of the same graphs or kernels, or graphs stay off."""
    engine = stub_engine()
    state, backbone, plain = engine.runner.buddy_state, engine.runner.model.model, KERNELS["reference"]
    with pytest.raises(ValueError), engine.eager():
        assert state.graphs is None
        assert state.kernels is state._moves_rows is backbone.bypasses[1].kernels is plain
        raise ValueError
    assert (state.graphs, state.kernels, state._moves_rows) == ("old graphs", "triton", "triton")
    assert backbone.bypasses == [None, StubBypass("triton"), None]


def test_without_bypass_graphs_are_captured_anew() -> None:
    """Fails if "no bypass" is timed with graphs that have the bypass in them."""
    engine = stub_engine()
    engine.drop_bypass()
    assert engine.runner.model.model.bypasses is None
    assert engine.runner.buddy_state.graphs == "new graphs"
