"""`vllm-buddy fetch-model`: the embedded model as a Hugging Face folder."""

import argparse
import sys
from pathlib import Path

from vllm_buddy.models.embedded import DEFAULT_MODEL, EMBEDDED_MODELS, default_folder, fetch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", default=DEFAULT_MODEL, help=f"which model: {', '.join(EMBEDDED_MODELS)} (the default)"
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, metavar="DIR", help=f"where to write it (default: {default_folder()})"
    )


def run(args: argparse.Namespace) -> int:
    # The folder alone goes to standard output: MODEL=$(vllm-buddy fetch-model)
    print(fetch(args.name, args.folder, report=lambda line: print(f"vllm-buddy: {line}", file=sys.stderr)))
    return 0
