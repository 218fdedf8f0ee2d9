"""Tests the kernel benchmark as far as possible without a GPU: its inputs, bytes, checks and rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import kernel_cases, kernel_speed
from benchmarks.gpu.kernel_cases import MODELS, OPS, Case, Model, all_cases, slots_case
from benchmarks.gpu.kernel_speed import (
    KERNEL,
    REFERENCE,
    TOLERANCE,
    Variant,
    all_variants,
    check,
    difference,
    rows_of,
)
from benchmarks.gpu.kernel_timing import (
    MAX_SETS,
    TARGET_US,
    Timed,
    copy_launches,
    empty_launches,
    num_launches,
    num_sets,
)
from benchmarks.harness.rounds import Refused, Rounds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = Model("tiny", hidden_size=32, num_layers=4)


def tiny_case(op: str, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(kernel_cases, "BATCHES", (3,))
    return next(all_cases([op], [TINY]))


def run_main(monkeypatch: pytest.MonkeyPatch, *options: str) -> pytest.ExceptionInfo[SystemExit]:
    """Run the benchmark, which must end before the measurement begins."""

    def start(**_: Any) -> None:
        raise AssertionError("the measurement begins")

    monkeypatch.setattr(kernel_speed, "environment", start)
    monkeypatch.setattr("sys.argv", ["kernel_speed.py", *options])
    with pytest.raises(SystemExit) as ended:
        kernel_speed.main()
    return ended


def test_without_a_gpu_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if a CPU run ends in a traceback, or measures the interpreter."""
    monkeypatch.setattr(kernel_speed, "device", lambda: "cpu")
    ended = run_main(monkeypatch, "--out", str(tmp_path / "out.jsonl"))
    assert "CUDA kernels" in str(ended.value)
    assert "tests/kernels" in str(ended.value)
    assert "\n" not in str(ended.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [("--rounds", "0"), ("--ops", "attention")])
def test_options_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]) -> None:
    """Fails if an empty median, or an unknown op, ends the benchmark after minutes."""
    assert run_main(monkeypatch, *options).value.code == 2


def test_bytes_of_each_op() -> None:
    """Fails if an op's GB/s counts what it does not need, or leaves out what it does. Each sum is made by hand."""
    # 3 tokens: run 4; 2 views: entry 4, slot 8. 3 runs: start, request 4 each; 2 views: position, length 4 each. End 4.
    assert kernel_cases.slots_bytes(2, 3, 3) == 3 * (4 + 2 * 12) + 3 * (8 + 2 * 8) + 4
    # 3 rows of 10 numbers of 2 bytes, four times; 3 row numbers of 8; the weight.
    assert kernel_cases.gather_bytes(3, 10) == 3 * 4 * 20 + 24 + 20
    assert kernel_cases.scatter_bytes(3, 10) == 3 * 4 * 20 + 12 + 20
    # 3 flags; three times 3 rows; two matrices of 4 x 10.
    assert kernel_cases.bypass_bytes(3, 10, 4) == 3 + 3 * 3 * 20 + 2 * 80


def test_every_op_is_measured_at_every_model() -> None:
    """Fails if a shape is left out, or two shapes have the same name and so the same rows."""
    names = [case.name for case in all_cases(list(OPS))]
    assert len(names) == len(set(names)) == len(MODELS) * (4 + 5 + 5 + 4)
    assert {case.op for case in all_cases(["gather_rows"])} == {"gather_rows"}


@pytest.mark.parametrize("op", list(OPS))
def test_right_outputs_pass_and_wrong_ones_are_refused(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a kernel's speed can be shown though it computes something else, or nothing."""
    case = tiny_case(op, monkeypatch)
    sets = [case.make(DEVICE)]
    rounds = Rounds(1)
    check(case, sets, all_variants(case, sets), rounds)
    rounds.add(0, KERNEL, us=1.0)
    assert rounds.values("us", KERNEL).tolist() == [1.0]
    kernel, reference = OPS[op]

    def spoilt(*arguments: Any) -> Any:
        outputs = kernel(*arguments)
        for output in case.run(lambda *_: outputs, arguments):
            output.view(-1)[-1] += 1 + output.abs().max()
        return outputs

    for wrong in (spoilt, lambda *_: None) if op in kernel_cases.IN_PLACE else (spoilt,):
        monkeypatch.setitem(OPS, op, (wrong, reference))
        with pytest.raises(Refused, match=f"{case.name}: kernel is off"):
            check(case, sets, all_variants(case, sets), Rounds(1))


def test_a_difference_is_noticed() -> None:
    """Fails if NaN, another shape or another integer counts as equal."""
    ones = torch.ones(4)
    assert difference(ones, ones) == 0.0
    assert difference(ones * 1.5, ones) == 0.5
    assert not difference(ones * float("nan"), ones) <= TOLERANCE
    assert difference(ones[:3], ones) == difference(ones.long(), ones.long() + 1) == float("inf")


def test_rows_of_a_case() -> None:
    """Fails if bandwidth, its share of the copy's, or a ratio is of another variant or upside down."""
    case = slots_case(TINY, 2)
    variants = [Variant(KERNEL, [], 4000), Variant(REFERENCE, [], 4000, captured=False)]
    rounds = Rounds(2)
    rounds.mark_checked(variant.name for variant in variants)
    for index in range(2):
        for name, us in ((KERNEL, 2.0), (REFERENCE, 10.0)):
            rounds.add(index, name, us=us)
    rows = rows_of(case, variants, rounds, copy_gb_per_s=4.0)
    found = {(row["variant"], row["metric"]): row for row in rows}
    assert len(found) == len(rows) == 7
    figures = {key: row["p50"] for key, row in found.items()}
    assert figures[KERNEL, "gb_per_s"] == 2.0
    assert figures[KERNEL, "copy_share"] == 0.5
    assert figures[REFERENCE, "gb_per_s"] == 0.4
    assert figures[KERNEL, "ratio_to_reference"] == 5.0
    assert found[REFERENCE, "us"]["timing"] == found[KERNEL, "ratio_to_reference"]["timing"] == "host"
    assert found[KERNEL, "us"]["timing"] == "graph"
    assert found[KERNEL, "us"]["n"] == 2
    assert {row["model"] for row in rows} == {"tiny"}
    assert {row["rows"] for row in rows} == {2}


def test_a_case_is_measured_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a variant is timed fewer times than asked, or as another one."""
    case = tiny_case("gather_rows", monkeypatch)
    on_device = replace(case, make=lambda _: case.make(DEVICE))

    class Constant:
        def __init__(self, launches: list[Any], captured: bool) -> None:
            self._is_kernel = launches[0].args[0] is OPS["gather_rows"][0]

        def us(self) -> float:
            return 2.0 if self._is_kernel else 6.0

    monkeypatch.setattr(kernel_speed, "Timed", Constant)
    monkeypatch.setattr(kernel_speed, "num_sets", lambda _: 2)
    rows = kernel_speed.measure(on_device, 3, copy_gb_per_s=1.0)
    assert {row["n"] for row in rows} == {3}
    assert len(rows) == 7
    assert [row["p50"] for row in rows if row["metric"] in ("us", "ratio_to_reference")] == [2.0, 6.0, 3.0]


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a CUDA device")
def test_launches_are_timed_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a captured graph leaves launches out: ten copies in a launch take much longer than one."""
    (copy,) = copy_launches()
    once, often = Timed([copy]), Timed([lambda: [copy() for _ in range(10)]])
    assert 5 < often.us() / once.us() < 20
    assert 0 < Timed(empty_launches() * 256).us() < once.us()
    rows = kernel_speed.measure(tiny_case("bypass_rows", monkeypatch), 2, copy_gb_per_s=1.0)
    assert {row["timing"] for row in rows if row["metric"] == "us"} == {"graph", "host"}


def test_unchecked_or_slow_launches() -> None:
    """Fails if an unchecked kernel has rows, sets stay in the cache, or a graph rotates through only some of them."""
    with pytest.raises(Refused, match="not checked"):
        rows_of(slots_case(TINY, 2), [Variant(KERNEL, [], 1)], Rounds(1), 1.0)
    assert num_sets(1) == MAX_SETS
    assert num_sets(2**30) == 1
    assert num_sets(2**20) == 192
    assert num_launches(4, us=TARGET_US * 10) == 4
    assert num_launches(4, us=TARGET_US / 100) == 100
    assert np.isclose(num_launches(256, us=2.0) * 2.0, TARGET_US, rtol=0.1)
