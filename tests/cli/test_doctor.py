"""The conclusions of `vllm-buddy doctor` from what it finds."""

import argparse
import json
import os
import signal
import time

import pytest

from vllm_buddy.cli import doctor, doctor_checks
from vllm_buddy.cli.doctor_checks import Check, check_imports, check_plugin, check_vllm
from vllm_buddy.cli.doctor_engine import judge
from vllm_buddy.cli.main import main


def outcomes(*layers: tuple[int, int]) -> str:
    found = [{"layers_executed_min": low, "layers_executed_max": high} for low, high in layers]
    return f"INFO something\ndoctor-engine:{json.dumps(found)}\nWARNING something"


def test_engine_that_keeps_the_budgets_is_ok() -> None:
    """Fails if an engine that runs all 6 layers at budget 1.0, and 3 at 0.5, is reported as broken."""
    check = judge(outcomes((6, 6), (3, 3)), 0)
    assert check.ok
    assert "6 and 3 of 6" in check.found


@pytest.mark.parametrize(
    ("output", "status", "part"),
    [
        (outcomes((6, 6), (3, 4)), 0, "3 to 4 layers"),
        ("doctor-engine:[null, null]", 0, "has no layer counts"),
        ("Traceback\nRuntimeError: no", 1, "RuntimeError: no"),
        ("", 0, "could not be served"),
    ],
)
def test_engine_that_does_not_is_a_failure(output: str, status: int, part: str) -> None:
    """Fails if one token at another depth, the stock model, a crash or no output passes the check."""
    check = judge(output, status)
    assert not check.ok
    assert part in check.found
    assert check.advice


def test_report_says_what_to_do() -> None:
    """Fails if the report of a failure has no advice."""
    checks = [Check("first", True, "fine"), Check("second", False, "broken\ndetails", "repair it")]
    text = doctor.report(checks, 80)
    assert "ok" in text
    assert "FAIL" in text
    assert text.endswith("second: broken\ndetails\n  do: repair it")


def test_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the exit status does not tell whether all checks pass."""
    monkeypatch.setattr(doctor, "CHECKS", (lambda: Check("one", True, "fine"),))
    assert main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "CHECKS", (lambda: Check("one", False, "broken", "repair"),))
    assert main(["doctor"]) == 1


def test_broken_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the report does not name a torchvision that does not fit torch, which breaks transformers."""
    errors = {"transformers.models.llama.modeling_llama": "RuntimeError: nms", "torchvision": "RuntimeError: nms"}
    monkeypatch.setattr(doctor_checks, "import_error", errors.get)
    monkeypatch.setattr(doctor_checks, "installed_version", lambda name: "1" if name == "torchvision" else None)
    check = check_imports()
    assert not check.ok
    assert "pip uninstall torchvision" in check.advice


def test_untested_vllm_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a version of vLLM that is not tested passes the check."""
    monkeypatch.setattr(doctor_checks, "installed_version", lambda name: "0.1.0" if name == "vllm" else None)
    check = check_vllm()
    assert not check.ok
    assert "0.1.0" in check.found


def test_missing_vllm_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a missing vLLM passes the check, or the advice does not say how to install it."""
    monkeypatch.setattr(doctor_checks, "installed_version", lambda name: None)
    check = check_vllm()
    assert not check.ok
    assert "pip install vllm==" in check.advice


def test_plugin_is_seen_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the check does not see the plugin as a fresh process does, like vLLM's engine processes."""
    assert check_plugin().ok
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS" in check_plugin().found


@pytest.mark.slow
def test_doctor() -> None:
    """Fails if a healthy installation does not pass every check, including the engine's."""
    assert main(["doctor"]) == 0


def test_the_engine_ends_with_a_doctor_that_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if SIGTERM ends the report at once, and leaves an engine, which has a session of its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def ended() -> Check:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        raise AssertionError("it goes on")

    monkeypatch.setattr(doctor, "CHECKS", (ended,))
    try:
        with pytest.raises(KeyboardInterrupt):
            doctor.run(argparse.Namespace(no_engine=True))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
