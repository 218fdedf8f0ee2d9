"""Tests that options which make a measurement impossible are refused before an engine starts."""

import argparse
import importlib

import pytest

from benchmarks.harness.rounds import at_least, positive_int

pytest.importorskip("vllm")
from benchmarks.harness.load import arrival_rate, positive_number

PEERS = "peers.compare"
ROUNDS = (
    *(
        f"speed.{n}"
        for n in (
            "decode",
            "prefill",
            "mixed",
            "profile_step",
            "serving",
            "memory",
            "kv_layouts",
            "in_process",
            "replicas",
        )
    ),
    PEERS,
)


@pytest.mark.parametrize(
    ("benchmark", "option", "value"),
    [
        *((name, "--rounds", "0") for name in ROUNDS),
        *((name, "--batch", "0") for name in ("speed.decode", "speed.profile_step", PEERS)),
        *((name, "--tokens", "1") for name in ("speed.decode", "speed.mixed", "speed.profile_step", PEERS)),
        ("speed.profile_step", "--tokens", "2"),
        ("speed.profile_step", "--paths", "0"),
        ("speed.profile_step", "--union-batch", "0"),
        ("speed.profile_step", "--union-paths", "-1"),
        ("speed.prefill", "--prompt-tokens", "0"),
        ("speed.mixed", "--each", "0"),
        ("speed.replicas", "--users", "1"),
        ("speed.replicas", "--seconds", "0"),
        ("speed.serving", "--rates", "0"),
        ("speed.serving", "--prefix-rates", "-2"),
        ("speed.serving", "--seconds", "0"),
        ("speed.serving", "--burst", "0"),
    ],
)
def test_it_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], benchmark: str, option: str, value: str
) -> None:
    """Fails if such an option ends a benchmark only after minutes, with an empty median or a division by zero."""
    module = importlib.import_module(f"benchmarks.{benchmark}")

    def start() -> None:
        raise AssertionError("the measurement begins")

    monkeypatch.setattr(module, "environment", start)
    out = ["out"] if benchmark.endswith("in_process") else []
    monkeypatch.setattr("sys.argv", [f"{benchmark}.py", *out, option, value])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert f"argument {option}" in capsys.readouterr().err


def test_numbers_that_can_be_measured_with_pass() -> None:
    """Fails if the smallest allowed number, or all requests at once, is refused."""
    assert positive_int("1") == 1
    assert at_least(3)("3") == 3
    assert arrival_rate("0.5") == positive_number("0.5") == 0.5
    assert arrival_rate("inf") == float("inf")


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "0", "many"])
def test_no_time_is_refused(text: str) -> None:
    """Fails if a run could have no duration, or never end."""
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        positive_number(text)
