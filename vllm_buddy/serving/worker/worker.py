"""vLLM's workers with a routed model runner."""

from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from vllm_buddy.errors import SettingsError, UnsupportedError
from vllm_buddy.serving.compat import mend_sampling_of_drafts
from vllm_buddy.serving.forward.adapters import routed_adapters
from vllm_buddy.serving.start.attached import kv_units_of
from vllm_buddy.serving.start.refusal_note import telling_refusals
from vllm_buddy.serving.start.settings import engine_settings
from vllm_buddy.serving.worker.state import WorkerState

# Tensors [num_tokens, hidden_size] that exist around a layer beside its own: hidden and residual, before and gathered.
_STATES_AROUND_A_LAYER = 4
_TABLES_OF_A_UNIT = 4  # two of vLLM's Model Runner V2, and what a step puts side by side, in eager steps for two steps


def routed_runner(runner: Any) -> Any:
    """Turn one of vLLM's model runners, V1 or V2, into a routed one, in place."""
    if runner.vllm_config.use_v2_model_runner:
        from vllm_buddy.serving.worker.runner_v2 import RoutedRunnerV2 as mixin
    else:
        from vllm_buddy.serving.worker.runner_v1 import RoutedRunnerV1 as mixin

        runner.buddy_state = WorkerState(runner.vllm_config)
    runner.__class__ = type(f"Routed{type(runner).__name__}", (mixin, type(runner)), {})
    return runner


class _BuddyWorker:
    """Mixin over vLLM's worker: swaps the class of the model runner that it builds."""

    def init_device(self) -> None:
        super().init_device()  # type: ignore[misc]
        self.model_runner: Any = routed_runner(self.model_runner)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's; then the functions of layers and bypasses are made, on the weights in their final form."""
        with telling_refusals():
            super().load_model(*args, **kwargs)  # type: ignore[misc]
        with set_current_vllm_config(self.model_runner.vllm_config), torch.inference_mode():
            self._backbone.prepare()
        if self.model_runner.vllm_config.lora_config is not None:
            self.model_runner.buddy_state.adapters = routed_adapters(self.model_runner)

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, which gives the model runner its KV cache."""
        with telling_refusals():
            return super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]

    def reload_weights(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse to load weights again: compiled layers, the bypass and merged LoRA hold the ones loaded at start.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("--model-impl buddy cannot load weights again; restart the server with the new ones")

    @property
    def _backbone(self) -> Any:
        return self.model_runner.model.model

    @telling_refusals()
    def _start_serving(self) -> None:
        self.model_runner.buddy_state.start_serving(self._backbone)


class BuddyGPUWorker(_BuddyWorker, Worker):
    """vLLM's GPU worker, routed."""

    @telling_refusals()
    def determine_available_memory(self) -> int:
        """What vLLM leaves for the KV cache, less graphs.memory_mib, the rows gathered around a layer and the block
        tables of KV units.

        Raises:
            SettingsError: nothing is left.
        """
        given = self.cache_config.kv_cache_memory_bytes is not None
        available = super().determine_available_memory()
        if given or available <= 0:  # vLLM says itself that the weights leave nothing
            return available
        graphs = engine_settings(self.vllm_config).graphs
        states = self.scheduler_config.max_num_batched_tokens * self.model_config.get_hidden_size()
        reserved = _STATES_AROUND_A_LAYER * states * self.model_config.dtype.itemsize
        if (units := kv_units_of(self.model_config)) is not None:
            blocks = -(-self.model_config.max_model_len // self.cache_config.block_size)
            reserved += _TABLES_OF_A_UNIT * units.num_units * self.scheduler_config.max_num_seqs * blocks * 4
        if graphs.enabled:
            reserved += graphs.memory_mib << 20
        # With --num-gpu-blocks-override vLLM does not look at what is left.
        if reserved >= available and self.cache_config.num_gpu_blocks_override is None:
            what = f"graphs.memory_mib {graphs.memory_mib} and " if graphs.enabled else ""
            raise SettingsError(
                f"no memory is left for the KV cache: {available >> 20} MiB are free beside the weights, and {what}"
                f"the rows and block tables of a step take {reserved >> 20}; lower "
                f"{'graphs.memory_mib or ' if graphs.enabled else ''}--max-num-batched-tokens, or raise "
                "--gpu-memory-utilization"
            )
        return available - reserved

    def _maybe_activate_jit_monitor(self) -> None:
        """The last step of vLLM's start. Afterwards vLLM takes every compilation for one that a request waits for."""
        self._start_serving()
        super()._maybe_activate_jit_monitor()


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker

    class BuddyCPUWorker(_BuddyWorker, CPUWorker):
        """vLLM's CPU worker, routed."""

        def init_device(self) -> None:
            super().init_device()
            if self.vllm_config.speculative_config is not None:
                mend_sampling_of_drafts()

        def compile_or_warm_up_model(self) -> Any:
            """vLLM's warm-up, then ours."""
            times = super().compile_or_warm_up_model()
            self._start_serving()
            return times
