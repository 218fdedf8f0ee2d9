"""Measures a batch of mixed budgets: is a step as fast as the costs of its layers predict, and does any budget wait?

    python -m benchmarks.speed.mixed            # SmolLM2-135M, CPU, about 3 minutes on 2 cores

8 requests each at budgets 1.0, 0.75 and 0.5 decode together: a step runs the union of their layers, each layer on the
rows that need it. The cost of the step is predicted from runs in which all n = 8, 16 or 24 requests have one budget:

    layer on n rows     c(n) = (t[1.0](n) - t[0.5, no bypass](n)) / layers between
    bypass on n rows    s(n) = (t[0.5](n) - t[0.5, no bypass](n)) / layers skipped
    all the rest        f(n) = t[1.0](n) - L c(n)
    predicted           f(24) + sum over layers of c(rows that run it) + s(rows that skip it)

`of_predicted` is tokens/s over the predicted tokens/s. `over_turns` compares with three batches of 8 that take turns,
as in a server without mixed batches. For the requests of one budget (a *class*), `first_token_step` is the step of the
run in which they got their first token, and `steps_per_token` the number of steps from one token to the next: 0 and 1
if they never waited. Every figure is taken within a round, where all variants run one after the other.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import engines
from benchmarks.harness.engines import Variant
from benchmarks.harness.lineup import Lineup, add_lineup_options, open_lineup
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Rounds, add_rounds_option, at_least, in_turn, positive_int

BUDGETS = (1.0, 0.75, 0.5)
PROMPT_TOKENS = 64
MIXED = "mixed"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.mixed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--each", type=positive_int, default=8, help="requests at each budget")
    add_rounds_option(parser, 6)
    parser.add_argument("--tokens", type=at_least(2), default=33, help="decoded tokens per run; each gives one step")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_mixed.jsonl")
    add_lineup_options(parser)
    args = parser.parse_args()
    env = environment()
    with open_lineup(args) as lineup:
        rows = measure(lineup, args.each, args.rounds, args.tokens)
    report(args.out, rows, env)


def measure(lineup: Lineup, each: int, num_rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Check all batches, time their decode steps, and return one row per figure."""
    rng = np.random.default_rng(each)
    rounds = Rounds(num_rounds)
    total = each * len(BUDGETS)
    classes = [lineup.routed(budget) for budget in BUDGETS]
    full, half = classes[0], classes[-1]
    bare = lineup.routed(BUDGETS[-1], bypass=False, note="no bypass")
    batches: dict[str, list[Variant]] = {MIXED: [one for one in classes for _ in range(each)]}
    for rows in range(each, total + 1, each):
        for variant in (full, half, bare):
            batches[batch_name(variant, rows)] = [variant] * rows
    batches[batch_name(classes[1], each)] = [classes[1]] * each  # takes its turn
    prompts = lineup.draw_prompts(rng, total, PROMPT_TOKENS)
    for name, variants in batches.items():
        lineup.check_together(list(zip(variants, prompts)), rounds, name)
    for budget in BUDGETS:
        rounds.mark_checked([class_name(budget)])
    for index in range(-1, num_rounds):  # the first warms up
        prompts = lineup.draw_prompts(rng, total, PROMPT_TOKENS)
        for name in in_turn(list(batches), index):
            run = engines.decode_together(list(zip(batches[name], prompts)), tokens)
            if index < 0:
                continue
            rounds.add(index, name, ms_per_step=float(np.median(run.step_ms)))
            if name == MIXED:
                for start, budget in enumerate(BUDGETS):
                    steps = np.array(run.token_steps[start * each : (start + 1) * each])
                    first, gaps = steps[:, 0].mean(), np.diff(steps, axis=1).mean()
                    rounds.add(index, class_name(budget), first_token_step=first, steps_per_token=gaps)
    return result_rows(lineup, rounds, each, [full, half, bare])


def result_rows(lineup: Lineup, rounds: Rounds, each: int, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Return one row per figure."""
    full, half, bare = variants
    total = each * len(BUDGETS)

    def ms(variant: Variant, rows: int) -> np.ndarray:
        return rounds.values("ms_per_step", batch_name(variant, rows))

    counts = range(each, total + 1, each)
    layer = {n: (ms(full, n) - ms(bare, n)) / (full.layers - bare.layers) for n in counts}
    bypass = {n: (ms(half, n) - ms(bare, n)) / (full.layers - half.layers) for n in counts}
    rest = ms(full, total) - full.layers * layer[total]
    predicted = predicted_ms(lineup, each, layer, bypass, rest)
    mixed = rounds.values("ms_per_step", MIXED)
    middle = rounds.values("ms_per_step", f"buddy {BUDGETS[1]} x {each}")
    turns = ms(full, each) + middle + ms(half, each)
    figures = {
        "ms_per_step": mixed,
        "tokens_per_s": total * 1e3 / mixed,
        "predicted_ms": predicted,
        "of_predicted": predicted / mixed,
        "over_turns": turns / mixed,
        "over_all_full": ms(full, total) / mixed,
    }
    about = {"batch": total, **lineup.about()}
    rows = [rounds.row(metric, values, variant=MIXED, **about) for metric, values in figures.items()]
    for n in counts:
        for metric, costs in (("layer_ms", layer), ("bypass_ms", bypass)):
            rows.append(rounds.row(metric, costs[n], variant=f"on {n} rows", **about))
    for budget in BUDGETS:
        for metric in ("first_token_step", "steps_per_token"):
            name = class_name(budget)
            rows.append(rounds.row(metric, rounds.values(metric, name), variant=name, **about))
    return rows


def predicted_ms(
    lineup: Lineup,
    each: int,
    layer: Mapping[int, np.ndarray],
    bypass: Mapping[int, np.ndarray],
    rest: np.ndarray,
) -> np.ndarray:
    """Return [num_rounds] the predicted ms of the mixed step. layer, bypass: ms on n rows, each [num_rounds]."""
    predicted = rest.copy()
    paths = [lineup.router.full if b == 1.0 else lineup.path(lineup.depth(b)) for b in BUDGETS]
    for index in range(lineup.num_layers):
        running = each * sum(path >> index & 1 for path in paths)
        skipping = each * len(paths) - running
        predicted += layer[running] if running else 0.0
        predicted += bypass[skipping] if skipping else 0.0
    return predicted


def batch_name(variant: Variant, rows: int) -> str:
    return f"{variant.name} x {rows}"


def class_name(budget: float) -> str:
    return f"{MIXED}: {budget}"


if __name__ == "__main__":
    main()
