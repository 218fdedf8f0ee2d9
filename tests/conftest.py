"""Settings for every test, made before torch, triton and vllm are imported."""

import os
from pathlib import Path

# Tiny models gain nothing from a second thread, and threads that wait for each other on a busy machine cost up to
# fifty times the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Without a GPU kernels run in Triton's interpreter.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# On a GPU vLLM's attention of fp32 models is Triton's, whose products must then be of fp32, too.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

from tests.harness import model_runner_v2

model_runner_v2.choose()
