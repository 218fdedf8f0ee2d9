"""What the doctor concludes from what it finds."""

import json

import pytest

from vllm_buddy.cli import doctor, doctor_checks
from vllm_buddy.cli.doctor_checks import Check, check_imports, check_plugin, check_vllm
from vllm_buddy.cli.doctor_engine import judge
from vllm_buddy.cli.main import main


def outcomes(*layers: tuple[int, int]) -> str:
    found = [{"layers_executed_min": low, "layers_executed_max": high} for low, high in layers]
    return f"INFO something\ndoctor-engine:{json.dumps(found)}\nWARNING something"


def test_engine_that_keeps_the_budgets_is_ok() -> None:
    """Budget 1.0 is all 6 layers of the tiny model, 0.5 is 3."""
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
    """One token at another depth, the stock model, a crash and silence are all failures."""
    check = judge(output, status)
    assert not check.ok
    assert part in check.found
    assert check.advice


def test_report_says_what_to_do() -> None:
    """A failure without advice leaves the user where he was."""
    checks = [Check("first", True, "fine"), Check("second", False, "broken\ndetails", "repair it")]
    text = doctor.report(checks, 80)
    assert "ok" in text
    assert "FAIL" in text
    assert text.endswith("second: broken\ndetails\n  do: repair it")


def test_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts read the status."""
    monkeypatch.setattr(doctor, "CHECKS", (lambda: Check("one", True, "fine"),))
    assert main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "CHECKS", (lambda: Check("one", False, "broken", "repair"),))
    assert main(["doctor"]) == 1


def test_broken_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA torchvision beside a CPU torch breaks transformers with an error that does not say so."""
    errors = {"transformers.models.llama.modeling_llama": "RuntimeError: nms", "torchvision": "RuntimeError: nms"}
    monkeypatch.setattr(doctor_checks, "import_error", errors.get)
    monkeypatch.setattr(doctor_checks, "installed_version", lambda name: "1" if name == "torchvision" else None)
    check = check_imports()
    assert not check.ok
    assert "pip uninstall torchvision" in check.advice


def test_untested_vllm_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    """The versions tested with are one constant, and another version is said to be untested."""
    monkeypatch.setattr(doctor_checks, "installed_version", lambda name: "0.1.0" if name == "vllm" else None)
    check = check_vllm()
    assert not check.ok
    assert "0.1.0" in check.found


def test_missing_vllm_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most common failure of all."""
    monkeypatch.setattr(doctor_checks, "installed_version", lambda name: None)
    check = check_vllm()
    assert not check.ok
    assert "pip install vllm==" in check.advice


def test_plugin_is_seen_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's engine processes are fresh ones."""
    assert check_plugin().ok
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS" in check_plugin().found


@pytest.mark.slow
def test_doctor() -> None:
    """A healthy installation passes every check, the engine's included."""
    assert main(["doctor"]) == 0
