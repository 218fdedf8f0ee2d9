"""A configuration that is made in a forked process."""

import subprocess
import sys

from vllm_buddy.models.embedded import fetch

# The draft exits of the shipped artifact are large enough for torch to share out work on them among threads.
FORKED = """
import os, signal, sys, torch
from vllm.engine.arg_utils import EngineArgs
torch.set_num_threads(2)
torch.stack([torch.ones(1 << 20)] * 2).half()  # by two threads, which the forked process does not have
if os.fork() == 0:
    signal.alarm(60)  # ends it if it waits for ever
    EngineArgs(model=sys.argv[1], model_impl="buddy").create_engine_config()
    os._exit(3)
print("ended with", os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_configuration_can_be_made_in_a_forked_process() -> None:
    """Fails if a program that uses torch, forks, and starts an engine then waits for ever, as it does not with vLLM.

    There an operation of torch on several threads never ends, so none is used while the configuration is made.
    """
    done = subprocess.run([sys.executable, "-c", FORKED, str(fetch())], capture_output=True, text=True, timeout=120)
    assert "ended with 3" in done.stdout, done.stderr[-2000:]
