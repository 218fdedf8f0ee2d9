"""Sends what nobody should send, drawn at random but the same on every run.

    python -m tools.fuzz

Three parts, of 20,000 cases by default: options of requests, checked in this process; artifacts, damaged in every
field and byte; and requests to a server of SmolLM2 (`--server-cases`), followed by a flood of cache salts and budgets.
A case fails if the answer is neither a result nor a refusal in one line, if what is accepted does not work, or if the
server has changed.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tools.features.servers import client, server
from tools.fuzzing import artifacts, options, requests
from vllm_buddy.models.embedded import DEFAULT_MODEL, fetch

_SHARE_OF_OPTIONS = 0.6  # of what does not go to the server
_SHARE_OF_SERVER = 50  # one of so many cases
_FLOOD = 2000


def main(argv: list[str] | None = None) -> int:
    """Run the cases, and print how many there were, what came of them and how long they took."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000, help="in all (default: %(default)s)")
    parser.add_argument("--server-cases", type=int, help=f"of them, to a server (default: one of {_SHARE_OF_SERVER})")
    parser.add_argument("--no-server", action="store_true", help="leave out the server")
    parser.add_argument("--log", type=Path, default=Path("results/fuzz-server.log"), help="of the server")
    args = parser.parse_args(argv)
    num_server = args.cases // _SHARE_OF_SERVER if args.server_cases is None else args.server_cases
    if args.no_server:
        num_server = 0
    if not 0 <= num_server <= args.cases:
        parser.error(f"--server-cases {num_server} must be a part of --cases, which are {args.cases}")
    num_options = int((args.cases - num_server) * _SHARE_OF_OPTIONS)
    num_artifacts = args.cases - num_server - num_options
    _timed(f"{num_options} options of requests", lambda: f"{options.fuzz(num_options)} refused")
    with tempfile.TemporaryDirectory() as folder:
        _timed(f"{num_artifacts} artifacts", lambda: f"{artifacts.fuzz(num_artifacts, Path(folder))} refused")
    print(f"memory of this process at most: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
    if num_server:
        model = fetch()
        with server(model, args.log, artifact=DEFAULT_MODEL) as process:
            asking = client(process, model, 0.75)
            _timed(
                f"{num_server} requests to a server", lambda: f"HTTP statuses {dict(requests.fuzz(asking, num_server))}"
            )
            _timed(f"{_FLOOD} cache salts and budgets", lambda: _flooded(*requests.flood(asking, _FLOOD, process.pid)))
    return 0


def _flooded(num_lines: int, growth: int) -> str:
    return f"{num_lines} lines of metrics before and after, memory grew by {growth >> 20} MiB"


def _timed(what: str, run: Callable[[], str]) -> None:
    started = time.monotonic()
    told = run()
    print(f"{what}: {told}, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
