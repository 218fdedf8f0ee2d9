"""Measures the GB/s of every Triton kernel beside its plain-PyTorch reference and the bandwidth of a copy.

    python -m benchmarks.gpu.kernel_speed                       # all ops, about 3 minutes on an H100
    python -m benchmarks.gpu.kernel_speed --ops gather_rows     # one op

The benchmark first measures the bandwidth of a large copy (bytes read and written) and the time of a kernel that does
nothing, which is the shortest possible launch. The bytes of an op are those it must move (kernel_cases.py), so a kernel
that moves more has a lower GB/s. Kernel and reference run one after the other in each round, without the host
(kernel_timing.py). `ratio_to_reference` is the reference's time over the kernel's within a round: above 1 the kernel is
faster. A reference that waits for the device cannot be captured, so the host launches it; its `timing` is "host".

Before anything is timed, the outputs are compared with the reference's on the same inputs.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.kernel_cases import ASKS_DEVICE, OPS, Case, all_cases
from benchmarks.gpu.kernel_timing import COPIED_BYTES, Timed, copy_launches, empty_launches, num_sets
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Refused, Rounds, add_rounds_option

Row = dict[str, Any]
KERNEL, REFERENCE = "kernel", "reference"
# Relative to the largest number in the output. A result may be rounded to bfloat16 up to three times, by 2 ** -8 each,
# in other places than the reference's. A wrong row is off by about 1.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Variant:
    """One way to compute a case, with a launch per working set."""

    name: str
    launches: Sequence[Callable[[], Any]]
    num_bytes: int
    captured: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.kernel_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_rounds_option(parser, 7)
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS), help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / "cuda_kernels.jsonl")
    args = parser.parse_args()
    if device() != "cuda":
        raise Refused("this measures CUDA kernels and finds no CUDA device; tests/kernels runs their logic without one")
    env = environment(on="cuda")
    bounds, copy_gb_per_s = measure_bounds(args.rounds)
    rows = bounds
    for case in all_cases(args.ops):
        print(case.name, flush=True)
        rows += measure(case, args.rounds, copy_gb_per_s)
        torch.cuda.empty_cache()
    report(args.out, rows, env)


def measure_bounds(num_rounds: int) -> tuple[list[Row], float]:
    """Return the rows of a copy and of an empty launch, and the copy's median bandwidth in GB/s."""
    rounds = Rounds(num_rounds)
    rounds.mark_checked(["copy", "empty launch"])
    copy, empty = Timed(copy_launches()), Timed(empty_launches() * 256)
    for index in range(num_rounds):
        rounds.add(index, "copy", us=copy.us())
        rounds.add(index, "empty launch", us=empty.us())
    bandwidth = gb_per_s(2 * COPIED_BYTES, rounds.values("us", "copy"))
    rows = [rounds.row("us", rounds.values("us", name), variant=name) for name in ("copy", "empty launch")]
    return [*rows, rounds.row("gb_per_s", bandwidth, variant="copy")], float(np.median(bandwidth))


def measure(case: Case, num_rounds: int, copy_gb_per_s: float) -> list[Row]:
    """Check all variants of a case, time them in turn on all working sets, and return one row per figure."""
    sets = [case.make("cuda") for _ in range(num_sets(case.num_bytes))]
    variants = all_variants(case, sets)
    rounds = Rounds(num_rounds)
    check(case, sets, variants, rounds)
    timed = {variant.name: Timed(variant.launches, variant.captured) for variant in variants}
    for index in range(num_rounds):
        first = index % len(variants)
        for variant in (*variants[first:], *variants[:first]):
            rounds.add(index, variant.name, us=timed[variant.name].us())
    return rows_of(case, variants, rounds, copy_gb_per_s)


def all_variants(case: Case, sets: Sequence[tuple[Any, ...]]) -> list[Variant]:
    """Return the kernel and its reference."""
    launches = [[partial(case.run, function, arguments) for arguments in sets] for function in OPS[case.op]]
    return [
        Variant(KERNEL, launches[0], case.num_bytes),
        Variant(REFERENCE, launches[1], case.num_bytes, captured=case.op not in ASKS_DEVICE),
    ]


def check(case: Case, sets: Sequence[tuple[Any, ...]], variants: Sequence[Variant], rounds: Rounds) -> None:
    """Compare every variant with the reference on the first and the last working set.

    Raises:
        Refused: one differs.
    """
    reference = OPS[case.op][1]
    for index in {0, len(sets) - 1}:
        # Both the outputs and their clones stay alive: a kernel that writes nothing must not find the right numbers in
        # memory that the reference has freed, or in arguments that it has written.
        outputs = case.run(reference, sets[index])
        expected = [output.clone() for output in outputs]
        for variant in variants:
            case.poison(sets[index])
            found = variant.launches[index]()
            error = max((difference(f, e) for f, e in zip(found, expected, strict=True)), default=0.0)
            if not error <= TOLERANCE:
                raise Refused(f"{case.name}: {variant.name} is off by {error:.3g} of the largest number, so no figures")
    rounds.mark_checked(variant.name for variant in variants)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error as a share of the largest expected number. For integers any difference is infinite."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-6)
    return float(error)


def gb_per_s(num_bytes: int, us: np.ndarray) -> np.ndarray:
    """Return the bandwidth in GB/s, where 1 GB is 10 ** 9 bytes. us: microseconds."""
    return num_bytes / us / 1e3


def rows_of(case: Case, variants: Sequence[Variant], rounds: Rounds, copy_gb_per_s: float) -> list[Row]:
    """Return the rows of a case: time, GB/s and share of the copy's bandwidth per variant, and the ratio of times."""
    rows = []
    for variant in variants:
        about = {"op": case.op, **case.about, "variant": variant.name}
        us = rounds.values("us", variant.name)
        bandwidth = gb_per_s(variant.num_bytes, us)
        timing = "graph" if variant.captured else "host"
        rows.append(rounds.row("us", us, **about, timing=timing))
        rows.append(rounds.row("gb_per_s", bandwidth, **about, num_bytes=variant.num_bytes))
        rows.append(rounds.row("copy_share", bandwidth / copy_gb_per_s, **about))
        if variant.name != KERNEL:
            about = {**about, "variant": KERNEL, "timing": timing}
            rows.append(rounds.row("ratio_to_reference", rounds.ratio("us", variant.name, KERNEL), **about))
    return rows


if __name__ == "__main__":
    main()
