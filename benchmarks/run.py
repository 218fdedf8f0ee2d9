"""All benchmarks, one after the other.

    python benchmarks/run.py            # the short form, to results/bench: under 20 minutes on 2 cores
    python benchmarks/run.py --full     # what the README shows, to benchmarks/results: about an hour

Each runs in a process of its own, so that none finds the engines of another in memory. One that refuses its figures
does not keep the others from running; the exit status then is 1.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path as FilePath

from result_rows import RESULTS_DIR, device

HERE = FilePath(__file__).parent
SHORT_DIR = HERE.parent / "results" / "bench"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(commands(True, RESULTS_DIR)), help="default: all")
    args = parser.parse_args()
    out = RESULTS_DIR if args.full else SHORT_DIR
    failed = []
    for name, command in commands(args.full, out).items():
        if args.only and name not in args.only:
            continue
        started = time.monotonic()
        print(f"=== {name}: python benchmarks/{' '.join(command)}", flush=True)
        status = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]]).returncode
        print(f"=== {name}: {time.monotonic() - started:.0f} s", flush=True)
        failed += [name] if status else []
    print(f"results are in {out}" + (f"; refused or failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def commands(full: bool, out: FilePath) -> dict[str, list[str]]:
    """Script and arguments of each benchmark."""

    def to(name: str) -> list[str]:
        return ["--out", str(out / f"{device()}_{name}.jsonl")]

    serving_load = [] if full else ["--rounds", "2", "--rates", "inf", "--prefix-rates", "--burst", "32"]
    return {
        "in process": ["in_process.py", str(out), *([] if full else ["--short"])],
        "serving": ["serving.py", *serving_load, *to("serving")],
        "peers": ["peers.py", *([] if full else ["--short"]), *to("peers")],
        **({"memory": ["memory.py", *to("memory")], "overload": ["overload.py", *to("overload")]} if full else {}),
    }


if __name__ == "__main__":
    sys.exit(main())
