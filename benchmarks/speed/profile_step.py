"""Measures where the time of a decode step goes, and what it costs when requests of a batch run different paths.

    python -m benchmarks.speed.profile_step --plot docs/union.png     # SmolLM2-135M, CPU, about 10 minutes on 2 cores

*Split*: the time of a decode step by part (see step_parts.PARTS), for stock vLLM, buddy at budget 1.0, and buddy at
--budget with one or more distinct paths in the batch. The paths are random and given to the requests in turn. A
Decision Module of the real size is evaluated all the same, every 16 tokens. With an artifact that can, the schedule
`token` is measured too, which decides for every token. A part is the mean over a run's steps and
not the median: only means sum to the step, and all requests ask the Decision Module in the same step, which is one of
16. The step that ends the requests is left out. Every run is repeated without the wrappers that take the time:
`step_ms` is from that run, and `instrumented_ratio` shows what the wrappers cost. It runs on CPU, where calls return
when their work is done.

*Union*: see benchmarks/speed/union.py.

Before anything is timed, every variant must give the distributions of the method's plain forward on the same paths.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import engines
from benchmarks.harness.engines import Variant
from benchmarks.harness.given_paths import GivenPaths, draw_paths, draw_prompts, on_paths, union_of
from benchmarks.harness.lineup import Lineup, add_lineup_options, open_lineup
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Rounds, add_rounds_option, at_least, in_turn, positive_int
from benchmarks.speed import union
from benchmarks.speed.step_parts import PARTS, instrumented
from benchmarks.speed.union_plot import plot_union
from vllm_buddy.method import depth_for_budget

PROMPT_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.profile_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=["split", "union"], help="default: both")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1, 8, 32], help="of the split")
    parser.add_argument(
        "--paths", type=positive_int, nargs="+", default=[1, 4, 8, 32], help="distinct paths, of the split"
    )
    parser.add_argument("--union-batch", type=positive_int, default=32)
    parser.add_argument("--union-paths", type=positive_int, nargs="+", default=[2, 4, 8, 16, 32])
    add_rounds_option(parser, 6)
    parser.add_argument("--tokens", type=at_least(3), default=34, help="decoded tokens per run; each gives one step")
    parser.add_argument("--seed", type=int, default=0, help="of the random paths")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_profile.jsonl", help="of the split")
    parser.add_argument("--union-out", type=Path, default=RESULTS_DIR / f"{device()}_union.jsonl")
    parser.add_argument("--plot", type=Path, help="picture of the union effect; see also benchmarks.speed.union_plot")
    add_lineup_options(parser)
    args = parser.parse_args()
    env = environment()
    with open_lineup(args) as lineup:
        if args.only != "union":
            rows = measure(lineup, args.batch, args.budget, args.paths, args.rounds, args.tokens, args.seed)
            report(args.out, rows, env, print_split)
        if args.only != "split":
            load = (args.rounds, args.tokens, PROMPT_TOKENS)
            rows = union.measure(lineup, args.union_batch, args.budget, args.union_paths, *load, args.seed)
            report(args.union_out, rows, env)
            if args.plot is not None:
                plot_union(rows, args.plot)


def measure(
    lineup: Lineup,
    batches: Sequence[int],
    budget: float,
    path_counts: Sequence[int],
    num_rounds: int,
    tokens: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return the rows of the split at all batch sizes, one per figure. seed: of the random paths."""
    asked = (budget, path_counts, num_rounds, tokens, seed)
    return [row for batch in batches for row in measure_split(lineup, batch, *asked)]


def split_variants(lineup: Lineup, batch: int, budget: float, path_counts: Sequence[int], seed: int) -> list[Variant]:
    """Return stock, full depth, and one variant for each number of distinct paths that the batch can have."""
    depth = depth_for_budget(budget, lineup.num_layers)
    drawn = draw_paths(np.random.default_rng(seed), max(path_counts), depth, lineup.num_layers)
    variants = [lineup.stock(), lineup.routed(1.0)]
    for count in path_counts:
        if count <= batch:
            noun = "path" if count == 1 else "paths"
            variants.append(on_paths(lineup, drawn[:count], f"buddy {budget}, {count} {noun}"))
    if lineup.artifact.token is not None:
        variants.append(lineup.routed_by_token(budget))
    return variants


def measure_split(
    lineup: Lineup,
    batch: int,
    budget: float,
    path_counts: Sequence[int],
    num_rounds: int,
    tokens: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Check all variants of one batch size, split their steps into parts, and return one row per figure."""
    rng = np.random.default_rng(batch)
    rounds = Rounds(num_rounds)
    variants = split_variants(lineup, batch, budget, path_counts, seed)
    lineup.check(variants, draw_prompts(lineup, rng, batch, PROMPT_TOKENS), rounds)
    for index in range(-1, num_rounds):  # the first warms up
        prompts = draw_prompts(lineup, rng, batch, PROMPT_TOKENS)
        for variant in in_turn(variants, index):
            plain = engines.decode(variant, prompts, tokens)
            with instrumented(variant) as clock:
                engines.decode(variant, prompts, tokens)
            if index >= 0:
                # The first step is the prefill, and the last also ends the requests and writes the metrics.
                rounds.add(index, variant.name, **split_figures(plain.all_ms[1:-1], clock.steps[1:-1]))
    return [row for variant in variants for row in split_rows(rounds, variant, batch, lineup)]


def split_figures(plain_ms: Sequence[float], steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the figures of one round. plain_ms: decode steps without wrappers. steps: with wrappers, ms by part."""
    total = [sum(parts.values()) for parts in steps]
    return {
        "step_ms": float(np.mean(plain_ms)),
        # A ratio of medians: one step that the machine disturbs would dominate a difference of means.
        "instrumented_ratio": float(np.median(total) / np.median(plain_ms)),
        **{part: float(np.mean([parts[part] for parts in steps])) for part in PARTS},
    }


def split_rows(rounds: Rounds, variant: Variant, batch: int, lineup: Lineup) -> list[dict[str, Any]]:
    """Return the rows of one variant: step_ms, instrumented_ratio, and part_ms and part_share for each part."""
    paths = variant.router.paths if isinstance(variant.router, GivenPaths) else []
    about = {
        "variant": variant.name,
        "batch": batch,
        "budget": variant.budget,
        "layers": variant.layers,
        "distinct_paths": len(paths) or 1,
        "union_layers": union_of(paths).bit_count() if paths else variant.layers,
        **lineup.about(),
    }
    rows = [rounds.row(m, rounds.values(m, variant.name), **about) for m in ("step_ms", "instrumented_ratio")]
    parts = {part: rounds.values(part, variant.name) for part in PARTS}
    step = np.sum(list(parts.values()), axis=0)
    for part, values in parts.items():
        rows.append(rounds.row("part_ms", values, part=part, **about))
        rows.append(rounds.row("part_share", values / step, part=part, **about))
    return rows


def print_split(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table per batch size, with a line per part: ms and percent of the step by variant, medians of rounds."""
    found = {(row["batch"], row["variant"], row["metric"], row.get("part")): row["p50"] for row in rows}
    for batch in dict.fromkeys(row["batch"] for row in rows):
        names = list(dict.fromkeys(row["variant"] for row in rows if row["batch"] == batch))
        print(f"\nbatch {batch:<10}" + "".join(f"{name:>22}" for name in names))
        for part in PARTS:
            cells = [
                f"{found[batch, n, 'part_ms', part]:12.3f} ms {found[batch, n, 'part_share', part]:6.1%}" for n in names
            ]
            print(f"{part:16}" + "".join(cells))
        for metric in ("step_ms", "instrumented_ratio"):
            print(f"{metric:18}" + "".join(f"{found[batch, name, metric, None]:10.3f}{'':12}" for name in names))


if __name__ == "__main__":
    main()
