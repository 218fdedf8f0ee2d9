"""`vllm-buddy eval-budget`: compares budget `auto` with constant budgets and with the best choice."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_buddy.cli.device_memory import says_what_saves_memory
from vllm_buddy.cli.progress import note, print_progress
from vllm_buddy.cli.setting_options import add_setting_options, read_settings
from vllm_buddy.cli.table import format_table
from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation.eval_budget_settings import EvalBudgetSettings

if TYPE_CHECKING:
    from vllm_buddy.evaluation.auto_figures import AutoEvaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field of EvalBudgetSettings, and options for the output files."""
    add_setting_options(parser, EvalBudgetSettings, positional=("data",))
    parser.add_argument("--json", type=Path, metavar="OUT", help="file for the figures, written as a JSON list")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="file for a picture of loss against layers")


@says_what_saves_memory("lower --prompt, --context or --answer, or give --dtype bfloat16")
def run(args: argparse.Namespace) -> int:
    """Measure, print a table and write the requested files; returns 0.

    Raises:
        BuddyError: a setting, data, model or artifact cannot be used.
    """
    settings = read_settings(EvalBudgetSettings, args, EvaluationError)
    from vllm_buddy.evaluation.auto_figures import evaluate_auto
    from vllm_buddy.evaluation.auto_plot import plot_auto
    from vllm_buddy.evaluation.plot import check_plotting
    from vllm_buddy.evaluation.results import write_rows
    from vllm_buddy.models.find import find_model

    if args.plot is not None:
        check_plotting()
    found = evaluate_auto(settings, find_model(settings.model, note), print_progress, note)
    print(gain_table(found))
    if args.json is not None:
        write_rows(found.rows, args.json)
    if args.plot is not None:
        plot_auto(found, args.plot)
    for written in (args.json, args.plot):
        if written is not None:
            print(f"wrote {written}")
    return 0


def gain_table(found: "AutoEvaluation") -> str:
    """Return a table with a line for each data set at the artifact's price.

    All data sets together also have a line near each constant budget.
    """
    *_, whole = names = found.data_sets
    depths = sorted(row["layers"] for row in found.of("constant", whole))[1:-1]
    rows = [*map(found.at_own_price, names), *(found.nearest(whole, depth) for depth in depths)]
    return format_table(
        ["data", "price", "layers", "auto", "constant", "best", "saved", "share of best"],
        [
            [
                row["data_set"],
                f"{row['price']:g}",
                f"{row['layers']:.2f}",
                f"{row['loss']:.4f}",
                f"{row['constant']:.4f}",
                f"{row['best']:.4f}",
                f"{row['gain']:.4f} ± {row['stderr']:.4f}",
                "" if row["share_of_best"] is None else f"{row['share_of_best']:.0%}",
            ]
            for row in rows
        ],
    )
