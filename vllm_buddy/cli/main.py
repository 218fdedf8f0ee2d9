"""The entry point of `vllm-buddy`: runs a command and reports a user's mistake in one line instead of a traceback.

Each command is a module of this package with `add_arguments(parser)` and `run(args) -> int`. It is imported only when
it is used, so that `vllm-buddy --help` loads neither torch nor vLLM. The arguments of `serve` are passed on unparsed.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from vllm_buddy import __version__
from vllm_buddy.cli.config_arguments import take_words
from vllm_buddy.errors import BuddyError

COMMANDS = {
    "serve": "start vLLM's server with --model-impl buddy; takes every option of `vllm serve`",
    "fetch-model": "write an embedded model as a Hugging Face folder",
    "prior": "measure layer importance and write an artifact",
    "sample": "write training text sampled from the model itself",
    "train": "train a bypass or LoRA and a router, in one artifact for all budgets",
    "train-budget": "train a Budget Predictor, which chooses the budget of requests that say auto",
    "train-drafts": "search the layers that draft in lossless mode, and train their exits",
    "eval": "measure quality by policy and budget: perplexity, multiple choice, closeness to the unrouted model",
    "depth-profile": "measure how often drafts from fewer layers are right, and what lossless mode would gain",
    "eval-budget": "compare budget auto with constant budgets and with the best choice",
    "plot": "draw the figures of `vllm-buddy eval`",
    "orders": "measure the order in which static pruning removes layers",
    "prune": "prune layers statically, as an artifact and as a checkpoint for stock vLLM",
    "artifacts": "list the artifacts that come with this package",
    "demo": "serve the embedded model and compare budgets",
    "playground": "serve a page that asks a running server at several budgets and lights the layers",
    "doctor": "check the installation and say how to repair each failure",
}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 2 for a user's mistake, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["serve"]:
            from vllm_buddy.cli.serve import serve

            return serve(arguments[1:])
        parser, args = _parse(arguments)
        if args.command is None:
            parser.print_help()
            return EXIT_USER_ERROR
        return int(_module(args.command).run(args))
    except BuddyError as error:
        print(f"vllm-buddy: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("vllm-buddy: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parse(arguments: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="vllm-buddy", description="Per-request dynamic depth for vLLM.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"vllm-buddy {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    wanted = next((a for a in arguments if not a.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == wanted and name != "serve":
            _module(name).add_arguments(command)
    args, rest = parser.parse_known_args(arguments)
    if rest and not take_words(args, rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return parser, args


def _module(command: str) -> Any:
    return importlib.import_module(f"vllm_buddy.cli.{command.replace('-', '_')}")
