"""What a server allows its requests, in the processes that get it from another one."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.harness.engine import Tiny
from tests.serving.start.test_hook import configure

_IN_ANOTHER_PROCESS = """
import pickle, sys
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

SamplingParams(extra_args={"buddy_budget": 7})  # not checked so far: no plugin is loaded
config = pickle.load(sys.stdin.buffer)
try:
    SamplingParams(extra_args={"buddy_budget": 7}).verify(config, None, None, None)
except VLLMValidationError as error:
    print(error.parameter)
"""


def test_a_process_that_gets_the_configuration_has_the_plugin(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Fails if a bad budget reaches the scheduler where Ray makes the configuration elsewhere."""
    config = configure(tiny("llama")).model_config
    script = tmp_path / "script.py"
    script.write_text(_IN_ANOTHER_PROCESS)
    done = subprocess.run([sys.executable, str(script)], input=pickle.dumps(config), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert done.stdout.decode().splitlines()[-1] == "vllm_xargs.buddy_budget"


def test_limits_survive_copying(tiny: Callable[[str], Tiny]) -> None:
    """Fails if a limit is lost or takes the place of another on the way."""
    limits = configure(tiny("llama"), {"max_budget": 0.75, "prompt": "routed"}).model_config.buddy_limits
    assert pickle.loads(pickle.dumps(limits)) == limits == copy.deepcopy(limits)
