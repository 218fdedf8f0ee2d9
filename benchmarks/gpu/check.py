"""Runs the tests and benchmarks that need a GPU, within ten minutes.

    python -m benchmarks.gpu.check OUT                       # tests and benchmarks, each in its own process
    python -m benchmarks.gpu.check OUT --only facts decode   # some of them

OUT receives a log per part, the benchmarks' results as *.jsonl, and table.txt, each as soon as it is known. A part may
use the time that is left, up to its own limit. A part that needs more time than is left is not started; one that
exceeds its limit is ended. The checkout need not be installed, but vLLM must be importable, and so must pytest and
hypothesis for the tests.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from benchmarks.harness.result_rows import device
from benchmarks.harness.rounds import Refused, positive_int
from vllm_buddy import __version__
from vllm_buddy.cli.table import format_table

ROOT = Path(__file__).absolute().parents[2]
TABLE = "table.txt"
_PLUGIN_GROUP, _PLUGIN = "vllm.general_plugins", "buddy = vllm_buddy.serving.plugin:register"
_GRACE_S = 5  # between asking a part to end and killing it
_WIDTH = 120


@dataclass(frozen=True)
class Part:
    """One command. least_s: it is not started with less time left. most_s: it is ended after this time."""

    name: str
    command: Sequence[str]
    least_s: float
    most_s: float


@dataclass(frozen=True)
class Done:
    """The result of a part. outcome: "ok", "failed: ..." or "left out: ..."."""

    part: str
    seconds: float
    outcome: str
    last_line: str = ""

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder of logs and results")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[part.name for part in parts(Path())])
    parser.add_argument("--minutes", type=positive_int, default=10, help="in all; default: 10")
    args = parser.parse_args()
    if device() != "cuda":
        raise Refused("no CUDA device is found, and nothing here can be checked without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # raises, so that the running part is ended too
    wanted = [part for part in parts(args.out.absolute()) if args.only is None or part.name in args.only]
    return check(wanted, args.out, args.minutes * 60)


def parts(out: Path) -> list[Part]:
    """Return all parts, ordered so that a failure explains those of the following parts."""

    def benchmark(module: str, results: str, *options: str) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.{module}", *options, "--out", str(out / results)]

    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    serving = [
        f"tests/serving/{name}.py"
        for name in (
            "end_to_end/test_golden",
            "graphs/test_decode",
            "graphs/test_path_graphs",
            "graphs/test_graph_start",
            "end_to_end/test_strict",
        )
    ]
    return [
        Part("facts", [sys.executable, "-m", "benchmarks.gpu.facts"], 5, 60),
        Part("kernel-tests", [*tests, "tests/kernels"], 20, 120),
        Part("serving-tests", [*tests, *serving], 40, 240),
        Part("kernels", benchmark("gpu.kernel_speed", "cuda_kernels.jsonl"), 30, 120),
        # It writes its rows each time an engine ends. There are none before the first two engines have ended.
        Part("decode", benchmark("speed.decode", "cuda_decode.jsonl", "--device", "cuda", "--only-quick"), 150, 900),
    ]


def check(wanted: Sequence[Part], out: Path, seconds: float) -> int:
    """Run all parts, print and write the table, and return the exit status."""
    end = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    env = environment_of_parts(out)
    done: list[Done] = []
    for part in wanted:
        left = end - time.monotonic()
        if left < part.least_s:
            done.append(Done(part.name, 0.0, f"left out: {max(left, 0):.0f} s left, it takes {part.least_s} at least"))
        else:
            print(f"=== {part.name}: {left:.0f} s left", flush=True)
            done.append(run(part, out / f"{part.name}.log", min(left, part.most_s), env))
        (out / TABLE).write_text(table(done) + "\n")
    print(table(done))
    return int(not all(one.ok for one in done))


def run(part: Part, log: Path, limit_s: float, env: dict[str, str]) -> Done:
    """Run a part until it ends or its time is up."""
    started = time.monotonic()
    with log.open("wb") as output:
        # It has its own session, so that the processes of its engines can be ended with it.
        child = subprocess.Popen(
            part.command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=env, start_new_session=True
        )
        try:
            status = child.wait(limit_s)
            outcome = "ok" if status == 0 else f"failed: status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"failed: not finished after {limit_s:.0f} s"
        finally:
            _end(child)
    return Done(part.name, time.monotonic() - started, outcome, last_line(log))


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End the processes of a part, first with SIGTERM, then with SIGKILL."""
    for number, grace_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(child.pid, number)
            child.wait(grace_s)
        except ProcessLookupError:  # all have ended
            break
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def table(done: Sequence[Done]) -> str:
    """Return the table, with a line per part."""
    rows = [[one.part, f"{one.seconds:.0f}", one.outcome, one.last_line] for one in done]
    return format_table(["part", "seconds", "", "last line of its log"], rows, _WIDTH)


def environment_of_parts(out: Path) -> dict[str, str]:
    """Return an environment in which Python imports the checkout and vLLM finds the plugin as if it were installed."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    if not any(point.name == "buddy" for point in entry_points(group=_PLUGIN_GROUP)):
        metadata = out.absolute() / "plugin" / f"vllm_buddy-{__version__}.dist-info"
        metadata.mkdir(parents=True, exist_ok=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-buddy\nVersion: {__version__}\n")
        (metadata / "entry_points.txt").write_text(f"[{_PLUGIN_GROUP}]\n{_PLUGIN}\n")
        paths.append(str(metadata.parent))
    # vLLM's own log says which attention backend it chose, and how much time and memory its graphs took.
    return {"VLLM_LOGGING_LEVEL": "INFO", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


if __name__ == "__main__":
    sys.exit(main())
