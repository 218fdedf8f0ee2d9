"""Workers: vLLM's own, with a model runner that takes the plan."""

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from vllm_buddy.serving.routed_steps import RoutedSteps
from vllm_buddy.serving.startup import engine_settings


def routed_runner(runner: Any) -> Any:
    """Turn a model runner of vLLM's, V1 or V2, into a routed one, in place."""
    if runner.vllm_config.use_v2_model_runner:
        from vllm_buddy.serving.runner_v2 import RoutedRunnerV2 as mixin
    else:
        from vllm_buddy.serving.runner_v1 import RoutedRunnerV1 as mixin

        runner.buddy_steps = RoutedSteps(runner.vllm_config)
    runner.__class__ = type(f"Routed{type(runner).__name__}", (mixin, type(runner)), {})
    return runner


class _BuddyWorker:
    """Mixin over vLLM's worker: swaps the class of the model runner it builds."""

    def init_device(self) -> None:
        super().init_device()  # type: ignore[misc]
        self.model_runner: Any = routed_runner(self.model_runner)

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's warm-up, then ours."""
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        self.model_runner.buddy_steps.start_serving(self.model_runner)
        return times


class BuddyGPUWorker(_BuddyWorker, Worker):
    """vLLM's GPU worker, routed."""

    def determine_available_memory(self) -> int:
        """What vLLM leaves for the KV cache, less what our graphs may take."""
        available = super().determine_available_memory()
        settings = engine_settings(self.vllm_config)
        if not settings.cuda_graphs or self.cache_config.kv_cache_memory_bytes is not None:
            return available
        return available - (settings.graph_memory_mib << 20)


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker

    class BuddyCPUWorker(_BuddyWorker, CPUWorker):
        """vLLM's CPU worker, routed."""
