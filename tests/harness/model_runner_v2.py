"""Runs vLLM's Model Runner V2 without a GPU: its kernels in Triton's interpreter, its attention on CPU.

Everything but CUDA itself then runs for real, so the tests of the plugin apply to it unchanged.
`BUDDY_TEST_RUNNER=v2 pytest tests/serving/end_to_end/test_golden.py` runs a file on it. `v2-async` adds asynchronous
scheduling, which vLLM does not offer on CPU.
"""

import os
from typing import Any

RUNNER = os.environ.get("BUDDY_TEST_RUNNER", "v1")


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


def choose() -> None:
    """Make vLLM use the runner that the environment asks for. Call it before vLLM is imported."""
    if RUNNER == "v1":
        return
    if RUNNER not in ("v2", "v2-async"):
        raise ValueError(f"BUDDY_TEST_RUNNER is {RUNNER!r}; known are v1, v2, v2-async")
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from triton.backends import Backend, backends

    # vLLM requires a backend of Triton that runs on CPU. The interpreter needs none, so this is a stub.
    backends["cpu"] = Backend(compiler=None, driver=_Driver)
    if RUNNER == "v2-async":
        _allow_asynchronous_scheduling()


def _allow_asynchronous_scheduling() -> None:
    """Turn asynchronous scheduling back on, which vLLM turns off on CPU because it gains nothing there."""
    from vllm.platforms.cpu import CpuPlatform

    switches_off = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        switches_off(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
