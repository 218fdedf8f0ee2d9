"""Runs the decode, prefill, mixed, profile and union benchmarks one after the other on the same engines.

    python -m benchmarks.speed.in_process OUT_DIR            # what each benchmark does by default
    python -m benchmarks.speed.in_process OUT_DIR --short    # fewer rounds

An engine takes most of a minute to start and compile. The benchmarks share engines here, and start their own when they
run alone.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.lineup import add_lineup_options, open_lineup
from benchmarks.harness.result_rows import device, environment, report
from benchmarks.harness.rounds import add_rounds_option
from benchmarks.speed import decode, mixed, prefill, profile_step, union

BUDGET = 0.5  # of the parts of a step and of the union effect
ROUNDS, SHORT_ROUNDS = 6, 3


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.in_process",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder of the results files")
    parser.add_argument("--short", action="store_true", help="fewer rounds and settings")
    add_rounds_option(parser, ROUNDS, SHORT_ROUNDS)
    add_lineup_options(parser)
    args = parser.parse_args()
    short, rounds = args.short, args.rounds or (SHORT_ROUNDS if args.short else ROUNDS)
    tokens = 17 if short else 33
    env = environment()
    with open_lineup(args) as lineup:
        jobs: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "decode": lambda: decode.measure(lineup, [8] if short else [1, 8, 32], rounds, tokens),
            "prefill": lambda: prefill.measure(lineup, [1500] if short else [256, 1500], rounds),
            "mixed": lambda: mixed.measure(lineup, 8, rounds, tokens),
            "profile": lambda: profile_step.measure(
                lineup, [8] if short else [1, 8, 32], BUDGET, [1, 4, 8, 32], rounds, tokens
            ),
            "union": lambda: union.measure(
                lineup, 32, BUDGET, [8, 32] if short else [2, 4, 8, 16, 32], rounds, tokens, profile_step.PROMPT_TOKENS
            ),
        }
        for name, measure in jobs.items():
            started = time.monotonic()
            report(args.out / f"{device()}_{name}.jsonl", measure(), env)
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
