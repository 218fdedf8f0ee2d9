"""`vllm-buddy depth-profile`: how often drafts from fewer layers are right, and what they would gain."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_buddy.cli.device_memory import says_what_saves_memory
from vllm_buddy.cli.progress import note, print_progress
from vllm_buddy.cli.setting_options import add_setting_options, read_settings
from vllm_buddy.cli.table import format_table
from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation.depth_profile_settings import DepthProfileSettings

if TYPE_CHECKING:
    from vllm_buddy.evaluation.depth_profile import Profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field of DepthProfileSettings, and options for the output files."""
    add_setting_options(parser, DepthProfileSettings)
    parser.add_argument("--json", type=Path, metavar="OUT", help="file for the figures")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="file for a picture")


@says_what_saves_memory("lower --tokens or --passage-tokens, or give --dtype bfloat16 or --device cpu")
def run(args: argparse.Namespace) -> int:
    """Measure, print tables and write the requested files; returns 0.

    Raises:
        BuddyError: a setting, the model, the artifact or the text cannot be used.
    """
    settings = read_settings(DepthProfileSettings, args, EvaluationError)
    from vllm_buddy.evaluation.depth_profile import profile_depths
    from vllm_buddy.evaluation.depth_profile_plot import plot_profile
    from vllm_buddy.evaluation.plot import check_plotting
    from vllm_buddy.models.find import find_model

    if args.plot is not None:
        check_plotting()
    profile = profile_depths(settings, find_model(settings.model, note), print_progress)
    for table in profile_tables(profile):
        print(f"\n{table}")
    if args.json is not None:
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(dataclasses.asdict(profile), indent=1) + "\n")
        except OSError as error:
            raise EvaluationError(f"cannot write {args.json}: {error.strerror or error}") from None
    if args.plot is not None:
        plot_profile(profile, args.plot)
    for written in (args.json, args.plot):
        if written is not None:
            print(f"wrote {written}")
    return 0


def profile_tables(profile: "Profile") -> list[str]:
    """Return the tables of depths, of predicted speed-ups (the best depth of each source), and of DEX.

    And of the artifact's draft exits, where it has some.
    """
    lengths = len(profile.depths[0]["right"])
    depths = [
        [str(row["depth"]), f"{row['cost']:.2f}", *(f"{r:.3f}" for r in row["right"]), f"{row['ead']:.3f}"]
        for row in profile.depths
    ]
    best: dict[tuple[int, str], list[str]] = {}
    for row in sorted(profile.speedups, key=lambda row: row["speedup"]):
        cells = [str(row["depth"] or ""), str(row["drafts"]), f"{row['speedup']:.3f}"]
        best[row["batch"], row["source"]] = cells
    speedups = [[str(batch), source, *cells] for (batch, source), cells in sorted(best.items())]
    dex = [
        [
            str(row["devices"]),
            f"{row['exit_speedup']:.2f} (stage {row['exit_stage']})",
            f"{row['exploration_speedup']:.2f}",
            f"{row['ratio']:.2f}",
        ]
        for row in profile.dex
    ]
    exits = [
        [str(row["depth"]), what, *(f"{share:.3f}" for share in row[name])]
        for row in profile.exits
        for name, what in (
            ("right", "as it drafts"),
            ("all_tokens", "among all tokens"),
            ("untrained", "with the bypass of each layer"),
            ("library", "path of the library"),
        )
        if row[name] is not None
    ]
    tables = [
        format_table(["layers", "cost", *(f"{n + 1} right" for n in range(lengths)), "EAD"], depths),
        format_table(["batch", "drafts from", "layers", "drafts", "predicted speed-up"], speedups),
        format_table(["devices", "best single exit", "exploration", "ratio"], dex),
    ]
    if exits:
        tables.append(format_table(["layers", "draft exit", *(f"{n + 1} right" for n in range(lengths))], exits))
    return tables
