"""The plugin's tests on Model Runner V2, in processes of their own: a process has one runner."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.harness.model_runner_v2 import RUNNER

ROOT = Path(__file__).parents[3]
PLUGIN = (
    "end_to_end/test_golden",
    "end_to_end/test_full_depth",
    "end_to_end/test_preemption",
    "end_to_end/test_context",
    "end_to_end/test_max_budget",
    "end_to_end/test_strict",
    "end_to_end/test_units",
    "schedule/test_prefix_cache",
    "forward/test_lora",
    "end_to_end/test_auto",
    "schedule/test_auto_arrival",
    "schedule/test_lowering",
    "telemetry/test_auto_metrics",
)

pytestmark = pytest.mark.skipif(RUNNER != "v1" or torch.cuda.is_available(), reason="runs on V2 already")


def run_on(runner: str, names: tuple[str, ...], chosen: str = "") -> None:
    """Run test files on a runner. chosen: an expression that picks some of their tests."""
    files = [f"tests/serving/{name}.py" for name in ("worker/test_runner_v2", *names)]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rp", "-p", "no:cacheprovider", "-W", "ignore", *files]
    done = subprocess.run(
        [*command, *(("-k", f"runner_v2 or ({chosen})") if chosen else ())],
        env={**os.environ, "BUDDY_TEST_RUNNER": runner},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    last_line = done.stdout.strip().splitlines()[-1]
    assert "passed" in last_line, last_line
    assert "skipped" not in last_line, last_line
    nothing_ran = [file for file in files if f"PASSED {file}::" not in done.stdout]
    assert not nothing_ran, f"the expression chooses no test of {nothing_ran}"


@pytest.mark.slow
def test_llama_on_v2() -> None:
    """Fails if V2 serves other tokens than the reference, in decode, prefill or after preemption."""
    run_on(
        "v2",
        ("end_to_end/test_golden", "end_to_end/test_preemption"),
        "llama and (4-masked or 1-kv_only) and not bare or of_all and (kv_only-7 or masked-33) or masked and lag",
    )


def test_llama_on_v2_with_asynchronous_scheduling() -> None:
    """Fails if a plan made before the last token is known reaches the wrong step, or its count does."""
    names = ("end_to_end/test_golden", "graphs/test_decode")
    run_on("v2-async", names, "llama and (1-masked-bypass or masked-33 or masked-0-True)")


@pytest.mark.slow
def test_units_on_v2() -> None:
    """Fails if V2 gives a layer the block table of another KV-cache group, or loses one when it preempts."""
    run_on("v2-async", ("end_to_end/test_units",), "units and (1-llama or preempted and 1)")


def test_drafts_on_v2() -> None:
    """Fails if V2 keeps the drafts from the scheduler, whose plan then is for other tokens."""
    run_on("v2", ("end_to_end/test_speculation",), "vllms_own and (draft_model or eagle)")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("runner", ["v2", "v2-async"])
def test_all_of_the_plugin_on_v2(runner: str) -> None:
    """The same for everything that serving promises, and every family."""
    run_on(runner, PLUGIN, "not sync")  # the worker that only keeps books, in both modes, keeps those of V1
