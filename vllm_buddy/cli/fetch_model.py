"""`vllm-buddy fetch-model`: writes an embedded model as a Hugging Face folder."""

import argparse
import sys
from pathlib import Path

from vllm_buddy.models.embedded import DEFAULT_MODEL, EMBEDDED_MODELS, default_folder, fetch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        default=DEFAULT_MODEL,
        help=f"name of the model: {', '.join(EMBEDDED_MODELS)} (default: %(default)s)",
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, metavar="DIR", help=f"folder to write it to (default: {default_folder('NAME')})"
    )


def run(args: argparse.Namespace) -> int:
    """Write the model and print its folder; returns 0."""
    # Only the folder goes to standard output, for MODEL=$(vllm-buddy fetch-model).
    print(fetch(args.name, args.folder, report=lambda line: print(f"vllm-buddy: {line}", file=sys.stderr)))
    return 0
