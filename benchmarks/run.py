"""Runs the main CPU benchmarks, one after the other.

    python -m benchmarks.run            # short form, writes to results/bench: under 20 minutes on 2 cores
    python -m benchmarks.run --full     # all rounds, memory and overload too, to benchmarks/results: about 90 minutes

Each benchmark runs in its own process, so that no engine of another one is in memory. If a benchmark fails or refuses
to show its figures, the others still run and the exit status is 1.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness.result_rows import RESULTS_DIR, device

ROOT = Path(__file__).parents[1]
SHORT_DIR = ROOT / "results" / "bench"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--full", action="store_true", help="all rounds; results go to benchmarks/results")
    parser.add_argument("--only", nargs="+", choices=list(commands(True, RESULTS_DIR)), help="default: all")
    args = parser.parse_args()
    if left_out := set(args.only or ()) - set(commands(args.full, SHORT_DIR)):
        parser.error(f"the short form has no {', '.join(sorted(left_out))}; add --full")
    out = RESULTS_DIR if args.full else SHORT_DIR
    failed = []
    for name, command in commands(args.full, out).items():
        if args.only and name not in args.only:
            continue
        started = time.monotonic()
        print(f"=== {name}: python -m {' '.join(command)}", flush=True)
        status = subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode
        print(f"=== {name}: {time.monotonic() - started:.0f} s", flush=True)
        failed += [name] if status else []
    print(f"results are in {out}" + (f"; refused or failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def commands(full: bool, out: Path) -> dict[str, list[str]]:
    """Return the module and arguments of each benchmark, by name."""

    def to(name: str) -> list[str]:
        return ["--out", str(out / f"{device()}_{name}.jsonl")]

    serving_load = [] if full else ["--rounds", "2", "--rates", "inf", "--prefix-rates", "--burst", "32"]
    return {
        "in process": ["benchmarks.speed.in_process", str(out), *([] if full else ["--short"])],
        "serving": ["benchmarks.speed.serving", *serving_load, *to("serving")],
        "peers": ["benchmarks.peers.compare", *([] if full else ["--short"]), *to("peers")],
        **(
            {
                "memory": ["benchmarks.speed.memory", *to("memory")],
                "max budget": ["benchmarks.speed.max_budget", *to("max_budget")],
                "overload": ["benchmarks.speed.overload", *to("overload")],
            }
            if full
            else {}
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
