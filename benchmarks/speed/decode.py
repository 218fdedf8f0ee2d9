"""Measures decode speed against stock vLLM and against physically pruned checkpoints, in alternating rounds.

    python -m benchmarks.speed.decode                   # SmolLM2-135M, CPU, about 10 minutes on 2 cores
    python -m benchmarks.speed.decode --device cuda     # 7B to 8B shapes, GPU of 80 GB; see benchmarks.gpu.decode_steps

Engines: stock vLLM on the whole model; stock vLLM on a checkpoint pruned to the layers of buddy's path, for each
budget, without any repair; buddy with the artifact's bypass, if it has one, and as *no bypass* without it. Requests of
buddy at one budget share a path: the Decision Module has the real size and scores the layers again every 16 tokens (the
server's default; R=1: before every token), but its last layer is zero, so the prior decides. If the artifact has its
own Decision Module, there are also variants that it routes. Their requests run different paths, and a step costs the
union of the paths. Ratios are taken within a round, where all variants run one after the other. They are tokens/s over
tokens/s: above 1 is faster than the peer.

Before anything is timed, every variant must give the distributions of the method's plain forward over the same layers,
with bypass and LoRA where it has them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import decode_steps
from benchmarks.gpu.decode_plan import add_gpu_options, refuse_gpu_options
from benchmarks.harness import engines
from benchmarks.harness.engines import DecodeRun, Variant
from benchmarks.harness.lineup import Lineup, add_lineup_options, open_lineup
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Rounds, add_rounds_option, at_least, in_turn, positive_int
from vllm_buddy.method import PathSchedule

BUDGETS = (0.875, 0.75, 0.5)
PROMPT_TOKENS = 64
CPU_BATCHES = (1, 8, 32)
CPU_TOKENS = 33


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu, engines side by side")
    parser.add_argument("--batch", type=positive_int, nargs="+", help="default: 1 8 32; with cuda 128 too")
    add_rounds_option(parser, 6)
    parser.add_argument(
        "--tokens", type=at_least(2), help="decoded tokens per run or repeat; default: 33, with cuda 64"
    )
    parser.add_argument("--out", type=Path, help="results file; default: in benchmarks/results")
    add_lineup_options(parser)
    add_gpu_options(parser)
    args = parser.parse_args()
    if args.device == "cuda":
        return decode_steps.run(args)
    refuse_gpu_options(parser, args)
    env = environment()
    with open_lineup(args) as lineup:
        rows = measure(lineup, args.batch or CPU_BATCHES, args.rounds, args.tokens or CPU_TOKENS)
    report(args.out or RESULTS_DIR / f"{device()}_decode.jsonl", rows, env)
    return 0


def measure(lineup: Lineup, batches: Sequence[int], num_rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Check all variants, time their decode steps, and return one row per figure."""
    variants = all_variants(lineup)
    rows = []
    for batch in batches:
        rows += measure_batch(lineup, variants, batch, num_rounds, tokens)
    return rows


def all_variants(lineup: Lineup) -> list[Variant]:
    """Return all variants, stock first."""
    variants = [lineup.stock(), *(lineup.pruned(budget) for budget in BUDGETS)]
    variants += [lineup.routed(budget) for budget in (1.0, *BUDGETS)]
    variants.append(lineup.routed(0.5, schedule=PathSchedule(interval=1), note="R=1"))
    if lineup.artifact.bypass is not None:
        variants += [lineup.routed(budget, bypass=False, note="no bypass") for budget in BUDGETS]
    if lineup.artifact.decision is not None:
        variants += [lineup.routed(budget, own_paths=True, note="own paths") for budget in BUDGETS[1:]]
    return variants


def measure_batch(
    lineup: Lineup, variants: Sequence[Variant], batch: int, num_rounds: int, tokens: int
) -> list[dict[str, Any]]:
    """Return all rows of one batch size."""
    rng = np.random.default_rng(batch)
    rounds = Rounds(num_rounds)
    lineup.check(variants, lineup.draw_prompts(rng, batch, PROMPT_TOKENS), rounds)
    for index in range(-1, num_rounds):  # the first warms up
        prompts = lineup.draw_prompts(rng, batch, PROMPT_TOKENS)
        for variant in in_turn(variants, index):
            with Overhead(variant) as spent:
                run = engines.decode(variant, prompts, tokens)
            if index < 0:
                continue
            rounds.add(index, variant.name, ms_per_step=float(np.median(run.step_ms)))
            if variant.budget is not None:
                rounds.add(index, variant.name, routing_share=spent.share(run))
    rows = []
    for variant in variants:
        about = {
            "variant": variant.name,
            "batch": batch,
            "budget": variant.budget,
            "layers": variant.layers,
            **lineup.about(),
        }
        figures = {
            "ms_per_step": rounds.values("ms_per_step", variant.name),
            "ratio_to_stock": rounds.ratio("ms_per_step", "stock", variant.name),
        }
        if variant.budget is not None:
            figures["ratio_to_pruned"] = rounds.ratio("ms_per_step", peer_of(variant), variant.name)
            figures["routing_share"] = rounds.values("routing_share", variant.name)
        rows += [rounds.row(metric, values, **about) for metric, values in figures.items()]
    return rows


class Overhead:
    """Measures the time that the engine spends on router, plan and views while the block runs."""

    def __init__(self, variant: Variant) -> None:
        self._variant = variant
        self._seconds = 0.0

    def _total(self) -> float:
        if self._variant.budget is None:
            return 0.0
        metrics = engines.core(self._variant.llm).scheduler._metrics
        return metrics.routing_seconds + engines.model_runner(self._variant.llm).buddy_state.view_seconds

    def __enter__(self) -> "Overhead":
        self._before = self._total()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds = self._total() - self._before

    def share(self, run: DecodeRun) -> float:
        """Return the share of the time of all steps, including the prefill and the routing of arriving requests."""
        return self._seconds * 1e3 / sum(run.all_ms)


def peer_of(variant: Variant) -> str:
    """Return the name of the stock vLLM variant with the same layers."""
    return "stock" if variant.budget == 1.0 else f"pruned {variant.budget}"


if __name__ == "__main__":
    sys.exit(main())
