"""Workers: vLLM's own, with a model runner that takes the plan."""

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from vllm_buddy.errors import UnsupportedError
from vllm_buddy.serving.start.hook import engine_settings
from vllm_buddy.serving.worker.state import RoutedSteps

_STATES_BESIDE_A_LAYER = 4  # [num_tokens, hidden_size]: before it, around it and gathered, as hidden and residual


def routed_runner(runner: Any) -> Any:
    """Turn a model runner of vLLM's, V1 or V2, into a routed one, in place."""
    if runner.vllm_config.use_v2_model_runner:
        from vllm_buddy.serving.worker.runner_v2 import RoutedRunnerV2 as mixin
    else:
        from vllm_buddy.serving.worker.runner_v1 import RoutedRunnerV1 as mixin

        runner.buddy_steps = RoutedSteps(runner.vllm_config)
    runner.__class__ = type(f"Routed{type(runner).__name__}", (mixin, type(runner)), {})
    return runner


class _BuddyWorker:
    """Mixin over vLLM's worker: swaps the class of the model runner it builds."""

    def init_device(self) -> None:
        super().init_device()  # type: ignore[misc]
        self.model_runner: Any = routed_runner(self.model_runner)

    def _start_serving(self) -> None:
        self.model_runner.buddy_steps.start_serving(self.model_runner)


class BuddyGPUWorker(_BuddyWorker, Worker):
    """vLLM's GPU worker, routed."""

    def determine_available_memory(self) -> int:
        """What vLLM leaves for the KV cache, less what our graphs may take, and rows on their way around a layer."""
        given = self.cache_config.kv_cache_memory_bytes is not None
        available = super().determine_available_memory()
        if given:
            return available
        settings = engine_settings(self.vllm_config)
        states = self.scheduler_config.max_num_batched_tokens * self.model_config.get_hidden_size()
        reserved = _STATES_BESIDE_A_LAYER * states * self.model_config.dtype.itemsize
        if settings.cuda_graphs:
            reserved += settings.graph_memory_mib << 20
        return available - reserved

    def _maybe_activate_jit_monitor(self) -> None:
        """The last that vLLM does at start, before it holds every compilation for one that a request waits for."""
        self._start_serving()
        super()._maybe_activate_jit_monitor()

    def sleep(self, level: int = 1) -> None:
        """As vLLM's, but that level 2 drops weights that it does not know how to load again."""
        if level == 2:
            raise UnsupportedError(
                "--model-impl buddy can sleep at level 1 only: level 2 would drop the bypass for good"
            )
        super().sleep(level)


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker

    class BuddyCPUWorker(_BuddyWorker, CPUWorker):
        """vLLM's CPU worker, routed."""

        def compile_or_warm_up_model(self) -> Any:
            """vLLM's warm-up, then ours."""
            times = super().compile_or_warm_up_model()
            self._start_serving()
            return times
