"""Sets environment variables for all tests before torch, triton and vllm are imported."""

import os
from pathlib import Path

# Tiny models do not get faster with a second thread. On a busy machine, threads that wait for each other can take fifty
# times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Once numba, with which vLLM compiles its drafter of n-grams, has threads of its own, torch's sums change in the last
# bit.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Without a GPU, kernels run in Triton's interpreter.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# On a GPU, vLLM uses Triton attention for fp32 models. Its matrix products must then also be in fp32, not TF32.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

import pytest
from hypothesis import settings

from tests.harness import model_runner_v2

model_runner_v2.choose()

# Examples are the same in every run, and a machine that is busy is no failure.
settings.register_profile("vllm_buddy", deadline=None, derandomize=True, database=None)
settings.load_profile("vllm_buddy")

# The files that take longest. They run first, so that processes side by side end at about the same time.
LONGEST_FILES = (
    "worker/test_on_runner_v2.py",
    "graphs/test_decode.py",
    "start/test_without_plugin.py",
    "end_to_end/test_server.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and leave the order as it is otherwise."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST_FILES))
