"""`vllm-buddy eval`: measures quality by policy and budget."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_buddy.cli.device_memory import says_what_saves_memory
from vllm_buddy.cli.plugin_check import require_plugin
from vllm_buddy.cli.progress import note, print_progress
from vllm_buddy.cli.setting_options import add_setting_options, read_settings
from vllm_buddy.cli.table import format_table
from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation.eval_settings import EvalSettings

if TYPE_CHECKING:
    from vllm_buddy.evaluation import Engine, EvalPlan, Figure

WINDOWS_AT_ONCE = 4  # at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field of EvalSettings, and options for the output files."""
    add_setting_options(parser, EvalSettings)
    parser.add_argument("--json", type=Path, metavar="OUT", help="file for the figures, written as a JSON list")
    parser.add_argument(
        "--plot", type=Path, metavar="OUT.png", help="file for a picture of quality against layers executed"
    )


@says_what_saves_memory("lower --window, or give --dtype bfloat16")
def run(args: argparse.Namespace) -> int:
    """Measure, print a table and write the requested files; returns 0.

    Raises:
        BuddyError: a setting, data, model or artifact cannot be used.
    """
    settings = read_settings(EvalSettings, args, EvaluationError)
    from vllm_buddy.evaluation import evaluate, make_plan
    from vllm_buddy.evaluation.plot import check_plotting, plot_figures
    from vllm_buddy.evaluation.results import save_results
    from vllm_buddy.models.find import find_model

    if args.plot is not None:
        check_plotting()
    plan = make_plan(settings, find_model(settings.model, note), print_progress)
    for line in plan.warnings:
        note(line)
    print(_what_is_measured(plan, settings), flush=True)
    figures = evaluate(plan, _engine(settings, plan), print_progress)
    print(figure_table(figures))
    if args.json is not None:
        save_results(figures, args.json)
    if args.plot is not None:
        plot_figures(figures, args.plot)
    for written in (args.json, args.plot):
        if written is not None:
            print(f"wrote {written}")
    return 0


def figure_table(figures: Sequence["Figure"]) -> str:
    """Return a table with one line per policy and budget and one column per metric."""
    metrics = list(dict.fromkeys(figure.metric for figure in figures))
    rows: dict[tuple[str, float, int], dict[str, str]] = {}
    for figure in figures:
        cells = rows.setdefault((figure.policy, figure.budget, figure.layers), {})
        cells[figure.metric] = f"{figure.value:.4g}" + (f" ± {figure.stderr:.2g}" if figure.stderr else "")
    return format_table(
        ["policy", "budget", "layers", *metrics],
        [
            [policy, f"{budget:g}", str(layers), *(cells.get(metric, "") for metric in metrics)]
            for (policy, budget, layers), cells in rows.items()
        ],
    )


def _what_is_measured(plan: "EvalPlan", settings: EvalSettings) -> str:
    parts = []
    if plan.windows:
        scored = sum(len(window.targets) for window in plan.windows)
        parts.append(
            f"{scored} tokens of {settings.text} in {len(plan.windows)} windows of {settings.window} at stride "
            f"{settings.window_stride}, each after a context of {settings.context}"
        )
    if plan.rows:
        parts.append(f"{len(plan.rows)} questions of {settings.piqa}")
    kl = "; KL needs --engine hf" if settings.engine == "vllm" and plan.windows else ""
    return f"scoring {' and '.join(parts)}; engine {settings.engine}, {settings.dtype}, KV {settings.kv_policy}{kl}"


def _engine(settings: EvalSettings, plan: "EvalPlan") -> "Engine":
    if settings.engine == "vllm":
        require_plugin()
        from vllm_buddy.evaluation.vllm_engine import VllmEngine

        return VllmEngine(plan.model_dir, settings.kv_policy, settings.dtype)
    from vllm_buddy.evaluation import HfEngine
    from vllm_buddy.evaluation.hf_engine import BATCH_TOKENS
    from vllm_buddy.models.folder import load_model
    from vllm_buddy.models.torch_device import find_device, torch_dtype

    model = load_model(plan.model_dir, torch_dtype(settings.dtype))
    # Batches follow the window, so that a smaller one takes less memory.
    batch_tokens = min(BATCH_TOKENS, WINDOWS_AT_ONCE * settings.window)
    return HfEngine(model.to(find_device("auto")), settings.kv_policy, batch_tokens)
