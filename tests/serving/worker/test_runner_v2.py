"""Model Runner V2: what is its own. The other tests of the plugin run on it through test_on_runner_v2.py."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.harness.batches import batch
from tests.harness.engine import Ask, Engine
from tests.harness.model_runner_v2 import RUNNER
from tests.harness.tiny_models import NUM_LAYERS
from vllm_buddy.serving.worker.batch import StepBatch

pytestmark = pytest.mark.skipif(RUNNER == "v1", reason="for BUDDY_TEST_RUNNER=v2 and v2-async")


def test_the_engine_runs_on_it(llama: Engine) -> None:
    """Fails if the tests of V2 run on V1."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vllm_buddy.serving.worker.runner_v2 import BuddyModelState

    assert isinstance(llama.runner, GPUModelRunner)
    assert isinstance(llama.runner.model_state, BuddyModelState)
    assert isinstance(llama.scheduler, AsyncScheduler) == (RUNNER == "v2-async")
    if RUNNER == "v2-async":
        assert llama.core.batch_queue_size == 2
        assert llama.scheduler._routes.schedule.lag == 1


def test_vllms_warm_up_without_a_plan_runs_before_serving_and_not_after(
    llama: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if vLLM's warm-up at start dies for want of a plan, or a step without one is served at full depth."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    # Some kernels of vLLM's sampler do not run in the interpreter: those of penalties, and of grammars.
    greedy = classmethod(lambda cls: cls(temperature=0.0))
    monkeypatch.setattr(SamplingParams, "for_sampler_warmup", greedy)
    runner = llama.runner
    worker = llama.core.model_executor.driver_worker.worker
    try:
        llama.state.serving = False
        warmup_kernels(runner, worker.execute_model, lambda grammar: worker.sample_tokens(None))
    finally:
        llama.state.serving = True
    assert llama.state.policy._slot == {}
    with pytest.raises(RuntimeError, match="a step without a plan, which would be served unrouted"):
        warmup_kernels(runner, worker.execute_model, lambda grammar: worker.sample_tokens(None))
    asks = batch(seed=2)
    llama.check(asks, llama.run(asks))


def test_dummy_runs_execute_all_layers_and_touch_no_request(llama: Engine) -> None:
    """Fails if a rank that idles beside others, or memory profiling, needs a plan or disturbs requests."""
    llama.configure("masked", 4)
    asks = batch(seed=1)

    def dummy(step: int) -> None:
        if step in (1, 5):
            llama.runner._dummy_run(4, uniform_decode=True)

    llama.check(asks, llama.run(asks, before_step=dummy))


def test_state_of_preempted_and_finished_requests_is_dropped(llama: Engine) -> None:
    """Fails if V2, where a preempted request comes back as a new one, leaks or continues state of its first life."""
    llama.configure("masked", 1)
    asks = batch(seed=3)

    def preempt(step: int) -> None:
        if step in (2, 4):
            llama.preempt(step)

    llama.check(asks, llama.run(asks, before_step=preempt))
    llama.step()
    assert llama.state.policy._slot == {}


def test_a_step_is_described_as_the_runner_batches_it(llama: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if V2's rows, which it sorts and maps to slots of its own, are described in another order or length."""
    step, described = type(llama.state).step, []

    def checked(steps: Any, batch: StepBatch) -> Any:
        num_reqs = len(batch.req_ids)
        assert len(batch.plans) == num_reqs == len(batch.num_computed_tokens) == len(batch.block_table)
        assert batch.num_tokens == len(batch.slot_mapping)
        assert batch.num_layers == NUM_LAYERS
        before = np.repeat(batch.num_computed_tokens - batch.query_start_loc[:-1], np.diff(batch.query_start_loc))
        positions = torch.from_numpy(before + np.arange(batch.num_tokens))
        rows = torch.from_numpy(np.repeat(np.arange(num_reqs), np.diff(batch.query_start_loc)))
        blocks = batch.block_table[rows, positions // batch.block_size].long()
        assert torch.equal(blocks * batch.block_size + positions % batch.block_size, batch.slot_mapping)
        described.append(num_reqs)
        return step(steps, batch)

    monkeypatch.setattr(type(llama.state), "step", checked)
    llama.configure("masked", 0, chunk=33)
    asks = [Ask((3,) * 40, 0.5, 4), Ask((4, 5), 1.0, 4), Ask((6,) * 50, 0.75, 4)]
    llama.check(asks, llama.run(asks))
    assert max(described) == 3
