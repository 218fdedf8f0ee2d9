"""Measures decode speed of depth and quantisation together, against stock vLLM on either model, in alternating rounds.

    python -m benchmarks.speed.quantised            # SmolLM2-135M, CPU, about 3 minutes on 2 cores

The model is quantised by rounding (`benchmarks.harness.quantised`), which says nothing about quality. Engines: stock
vLLM and buddy on the model as it is, and on one of each --format; all requests of a budget share a path, as in
benchmarks.speed.decode. `over_stock` is tokens/s over those of stock vLLM on the model as it is, and
`over_same_weights` over those of stock vLLM on the same weights.

Before anything is timed, every variant must give the distributions of the plain forward on its own, rounded weights,
with activations rounded where the format does.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import engines
from benchmarks.harness.engines import Variant
from benchmarks.harness.lineup import Lineup, add_lineup_options
from benchmarks.harness.quantised import FORMATS, quantise, round_activations, round_off
from benchmarks.harness.reference_check import NUM_CHECKED
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Rounds, add_rounds_option, at_least, in_turn, positive_int
from vllm_buddy.artifact import load_artifact
from vllm_buddy.models.embedded import fetch

BUDGETS = (1.0, 0.75, 0.5)
PROMPT_TOKENS = 64
AS_IS = "as it is"
COMPARED = ["compressed-tensors W8A8", "GPTQ"]  # of 8 and of 4 bits


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.quantised",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--format", choices=list(FORMATS), nargs="+", default=COMPARED, help="of the weights")
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1, 8], help="default: 1 8")
    parser.add_argument("--tokens", type=at_least(2), default=33, help="decoded tokens of a run; default: 33")
    add_rounds_option(parser, 6)
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_quantised.jsonl")
    add_lineup_options(parser)
    args = parser.parse_args()
    env = environment()
    with open_lineups(args) as lineups:
        rows = [row for batch in args.batch for row in measure(lineups, batch, args.rounds, args.tokens)]
    report(args.out, rows, env)


@contextmanager
def open_lineups(args: argparse.Namespace) -> Iterator[dict[str, Lineup]]:
    """Yield the engines on each kind of weights, AS_IS first, and remove their files afterwards."""
    work = Path(tempfile.mkdtemp(prefix="vllm_buddy-bench-"))
    model, artifact = args.model or fetch(report=print), load_artifact(args.artifact)
    lineups = {AS_IS: Lineup(model, artifact, work / AS_IS)}
    try:
        for number, kind in enumerate(args.format):
            folder = work / str(number)
            quantised, rounded = quantise(model, folder / "quantised", kind), round_off(model, folder / "rounded", kind)
            lineups[kind] = Lineup(quantised, artifact, folder, rounded, partial(round_activations, kind=kind))
        yield lineups
    finally:
        shutil.rmtree(work, ignore_errors=True)


def measure(lineups: dict[str, Lineup], batch: int, num_rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Check all variants, time their decode steps at one batch size, and return one row per figure."""
    rng = np.random.default_rng(batch)
    rounds = Rounds(num_rounds)
    variants: dict[str, list[Variant]] = {}
    for weights, lineup in lineups.items():
        mine = [lineup.stock(), *(lineup.routed(budget) for budget in BUDGETS)]
        variants[weights] = [replace(variant, name=f"{variant.name}, {weights}") for variant in mine]
        lineup.check(variants[weights], lineup.draw_prompts(rng, NUM_CHECKED, PROMPT_TOKENS), rounds)
    everyone = [variant for mine in variants.values() for variant in mine]
    for index in range(-1, num_rounds):  # the first warms up
        prompts = lineups[AS_IS].draw_prompts(rng, batch, PROMPT_TOKENS)
        for variant in in_turn(everyone, index):
            run = engines.decode(variant, prompts, tokens)
            if index >= 0:
                rounds.add(index, variant.name, ms_per_step=float(np.median(run.step_ms)))
    return [
        row
        for weights, mine in variants.items()
        for variant in mine
        for row in _rows(rounds, variant, weights, batch, (variants[AS_IS][0], mine[0]))
    ]


def _rows(
    rounds: Rounds, variant: Variant, weights: str, batch: int, stocks: Sequence[Variant]
) -> Iterator[dict[str, Any]]:
    """One row per figure. stocks: stock vLLM on the model as it is, and on the same weights."""
    about = {"variant": variant.name.removesuffix(f", {weights}"), "weights": weights, "batch": batch}
    about |= {"budget": variant.budget, "layers": variant.layers}
    yield rounds.row("ms_per_step", rounds.values("ms_per_step", variant.name), **about)
    for metric, stock in zip(("over_stock", "over_same_weights"), stocks):
        yield rounds.row(metric, rounds.ratio("ms_per_step", stock.name, variant.name), **about)


if __name__ == "__main__":
    main()
