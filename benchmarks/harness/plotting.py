"""Code that the plots of results files share: their command line and their canvas."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.result_rows import read_rows


def draw_from_file(
    module: str, description: str | None, plot: Callable[[Sequence[dict[str, Any]], Path], None]
) -> None:
    """Run the command line of a module that draws a results file: `python -m MODULE ROWS OUT`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, help="results file to read")
    parser.add_argument("out", type=Path, help="picture to write")
    args = parser.parse_args()
    plot(read_rows(args.rows), args.out)


def new_canvas(width: float, height: float) -> Any:
    """Return a matplotlib figure of this size in inches. Raises SystemExit if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("a plot needs matplotlib; pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")
