"""`vllm-buddy plot`: draws a results file of `vllm-buddy eval`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", type=Path, metavar="RESULTS.json", help="results file, written by `vllm-buddy eval --json`"
    )
    parser.add_argument("out", type=Path, metavar="OUT.png", help="file for the picture")


def run(args: argparse.Namespace) -> int:
    """Write the picture; returns 0.

    Raises:
        EvaluationError: the results cannot be read, matplotlib is missing, or the picture cannot be written.
    """
    from vllm_buddy.evaluation.plot import check_plotting, plot_figures
    from vllm_buddy.evaluation.results import load_results

    check_plotting()
    plot_figures(load_results(args.results), args.out)
    print(f"wrote {args.out}")
    return 0
