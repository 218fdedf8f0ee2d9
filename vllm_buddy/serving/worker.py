"""Workers: vLLM's own, with a model runner that takes the plan."""

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from vllm_buddy.serving.runner_v1 import routed_runner


class _BuddyWorker:
    """Mixin over vLLM's worker: swaps the class of the model runner it builds."""

    def init_device(self) -> None:
        super().init_device()  # type: ignore[misc]
        self.model_runner: Any = routed_runner(self.model_runner)


class BuddyGPUWorker(_BuddyWorker, Worker):
    """vLLM's GPU worker, routed."""


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker

    class BuddyCPUWorker(_BuddyWorker, CPUWorker):
        """vLLM's CPU worker, routed."""
