"""A configuration that is made in a forked process."""

import subprocess
import sys

import torch

from vllm_buddy.models.embedded import fetch
from vllm_buddy.serving.start.one_thread import on_one_thread

# The draft exits of the shipped artifact are large enough for torch to share out work on them among threads.
FORKED = """
import os, sys, torch
from vllm.engine.arg_utils import EngineArgs
torch.set_num_threads(2)
torch.stack([torch.ones(1 << 20)] * 2).half()  # by two threads, which the forked process does not have
if os.fork() == 0:
    EngineArgs(model=sys.argv[1], model_impl="buddy").create_engine_config()
    os._exit(3)
print("ended with", os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_configuration_can_be_made_in_a_forked_process() -> None:
    """Fails if a program that uses torch, forks, and starts an engine then waits for ever, as it does not with vLLM."""
    done = subprocess.run([sys.executable, "-c", FORKED, str(fetch())], capture_output=True, text=True, timeout=120)
    assert "ended with 3" in done.stdout, done.stderr[-2000:]


def test_torch_has_its_threads_again_afterwards() -> None:
    """Fails if a server's operations stay on one thread, also after an error."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with on_one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
