"""Measures the time to the first token of a prompt, against stock vLLM and pruned checkpoints.

    python -m benchmarks.speed.prefill            # SmolLM2-135M, CPU, about 5 minutes on 2 cores

Prefill is bound by arithmetic and not by reading weights, so each skipped layer saves its share per token. One request
runs at a time in an otherwise idle engine, without prefix caching; the time includes the first token. The engines are
those of benchmarks.speed.decode, in alternating rounds. `over_stock` is time over time: below 1 is sooner than stock
vLLM on the whole model.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import engines
from benchmarks.harness.lineup import Lineup, add_lineup_options, open_lineup
from benchmarks.harness.reference_check import NUM_CHECKED
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Rounds, add_rounds_option, in_turn, positive_int
from benchmarks.speed.decode import peer_of

BUDGETS = (0.75, 0.5)
CHECKED_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.prefill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompt-tokens", type=positive_int, nargs="+", default=[256, 1500])
    add_rounds_option(parser, 6)
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_prefill.jsonl")
    add_lineup_options(parser)
    args = parser.parse_args()
    env = environment()
    with open_lineup(args) as lineup:
        rows = measure(lineup, args.prompt_tokens, args.rounds)
    report(args.out, rows, env)


def measure(lineup: Lineup, lengths: Sequence[int], num_rounds: int) -> list[dict[str, Any]]:
    """Check all variants, time their prefill, and return one row per figure."""
    variants = [lineup.stock(), *(lineup.pruned(budget) for budget in BUDGETS)]
    variants += [lineup.routed(budget) for budget in (1.0, *BUDGETS)]
    if lineup.artifact.bypass is not None:
        variants += [lineup.routed(budget, bypass=False, note="no bypass") for budget in BUDGETS]
    rows = []
    for length in lengths:
        rng = np.random.default_rng(length)
        rounds = Rounds(num_rounds)
        lineup.check(variants, lineup.draw_prompts(rng, NUM_CHECKED, CHECKED_TOKENS), rounds)
        for index in range(-1, num_rounds):  # the first warms up
            prompts = lineup.draw_prompts(rng, 1, length)
            for variant in in_turn(variants, index):
                run = engines.decode(variant, prompts, 1)
                if index >= 0:
                    rounds.add(index, variant.name, ttft_ms=sum(run.all_ms))
        for variant in variants:
            about = {"variant": variant.name, "prompt_tokens": length, "budget": variant.budget}
            about |= {"layers": variant.layers, **lineup.about()}
            figures = {
                "ttft_ms": rounds.values("ttft_ms", variant.name),
                "over_stock": rounds.ratio("ttft_ms", variant.name, "stock"),
            }
            if variant.budget is not None:
                figures["over_pruned"] = rounds.ratio("ttft_ms", variant.name, peer_of(variant))
            rows += [rounds.row(metric, values, **about) for metric, values in figures.items()]
    return rows


if __name__ == "__main__":
    main()
