"""What a server allows its requests, in the processes that get it from another one."""

import copy
import pickle
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.engine import Engine, Tiny
from tests.harness.server_config import configure
from vllm_buddy import __version__
from vllm_buddy.errors import SettingsError
from vllm_buddy.serving.admission.auto_limits import AutoLimits
from vllm_buddy.serving.admission.limits import _restored

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


def test_what_the_server_allows_travels_to_other_processes(llama: Engine) -> None:
    """Fails if the limits cannot be pickled, or the tables of the predictor go with them to every process."""
    limits = llama.llm.llm_engine.model_config.buddy_limits
    text = pickle.dumps(limits)
    assert pickle.loads(text) == limits
    assert limits.auto is not None
    assert len(text) < 1000


@pytest.mark.parametrize(("floor", "told"), [(0.1, "down to 0.5 as"), (0.5, "down to 0.5 as"), (0.8, "down to 0.8 as")])
def test_the_log_names_the_budget_that_objectives_can_lead_to(floor: float, told: str) -> None:
    """Fails if a floor below the smallest depth of the Budget Predictor is promised, which no request can get."""
    limits = AutoLimits(30, (15, 19, 24, 30), 0.1, 1.0, 0.8, None, floor, {"itl": 0.05})
    assert told in limits.summary()


def test_limits_of_another_version_are_refused_with_both() -> None:
    """Fails if a node with another version of the package serves by limits that it may read otherwise."""
    with pytest.raises(SettingsError) as caught:
        _restored("0.0.1")
    assert f"vllm_buddy 0.0.1, but {platform.node()} has {__version__}" in str(caught.value)
    assert "same version of vllm-buddy on every node" in str(caught.value)
