"""Measures when depths per token pay, beside one depth per request and stock vLLM.

    python -m benchmarks.speed.schedules            # SmolLM2-135M; CPU: about 15 minutes on 2 cores

On a machine with a GPU this command measures there, with `--most-tokens 96000` for 64 prompts of 1,500 tokens too. It
has not been run on one.

A decode step of many requests reads the layers of all paths that its tokens run, while the tokens of a prompt are paid
for one by one. So each schedule is timed on prompts and on decoded tokens apart: requests arrive together, the first
steps run all prompts, and the steps after them decode. Prompts are real text, because
depths per token follow from the text. Engines alternate in each round.

`ttft_ms` is the mean over the requests, `tokens_per_s` that of the steps after the last first token. `over_stock` and
`decode_over_stock` are their ratios to stock vLLM: below 1, and above 1, is better.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import engines
from benchmarks.harness.engines import Variant
from benchmarks.harness.lineup import Lineup, add_lineup_options, open_lineup
from benchmarks.harness.real_prompts import passages
from benchmarks.harness.reference_check import NUM_CHECKED
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Refused, Rounds, add_rounds_option, in_turn, positive_int
from vllm_buddy.models.embedded import DEFAULT_MODEL
from vllm_buddy.models.folder import load_tokenizer

BUDGETS = (0.75, 0.5)
CHECKED_TOKENS = 64
NUM_TOKENS = 24
LONG = 12_000  # tokens of all prompts above which one round, of minutes, is enough


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.schedules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompt-tokens", type=positive_int, nargs="+", default=[256, 1500])
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument(
        "--most-tokens", type=positive_int, default=24_000, help="of all prompts; larger batches are left out"
    )
    add_rounds_option(parser, 3)
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_schedules.jsonl")
    add_lineup_options(parser, artifact=f"{DEFAULT_MODEL}-token")
    args = parser.parse_args()
    env = environment()
    with open_lineup(args, on_gpu=True) as lineup:
        rows = measure(lineup, args.prompt_tokens, args.batch, args.rounds, args.most_tokens)
    report(args.out, rows, env)


def measure(
    lineup: Lineup, lengths: Sequence[int], batches: Sequence[int], num_rounds: int, most_tokens: int
) -> list[dict[str, Any]]:
    """Check all variants, time them, and return one row per figure."""
    if lineup.artifact.token is None:
        raise Refused(f"artifact '{lineup.artifact.config.name}' has no schedule `token`")
    variants = [lineup.stock()]
    for budget in BUDGETS:
        variants += [lineup.routed(budget, note="request"), lineup.routed_by_token(budget)]
        variants.append(lineup.routed_by_token(budget, decode=False, note="token in prompts"))
    text = load_tokenizer(lineup.model)("\n\n".join(passages()), add_special_tokens=False)["input_ids"]
    lineup.check(variants, _draw(text, np.random.default_rng(0), NUM_CHECKED, CHECKED_TOKENS), Rounds(1))
    rows = []
    for length in lengths:
        for batch in batches:
            if length * batch > most_tokens:
                continue
            rng = np.random.default_rng((length, batch))
            is_long = length * batch > LONG
            rounds = Rounds(1 if is_long else num_rounds)
            rounds.mark_checked([variant.name for variant in variants])
            for index in range(0 if is_long else -1, rounds.num_rounds):  # round -1 warms up
                prompts = _draw(text, rng, batch, length)
                for variant in in_turn(variants, index):
                    figures = _timed(variant, prompts)
                    if index >= 0:
                        rounds.add(index, variant.name, **figures)
            for variant in variants:
                about = {"variant": variant.name, "prompt_tokens": length, "batch": batch, "budget": variant.budget}
                about |= {"layers": variant.layers, **lineup.about()}
                values = {
                    "ttft_ms": rounds.values("ttft_ms", variant.name),
                    "tokens_per_s": rounds.values("tokens_per_s", variant.name),
                    "over_stock": rounds.ratio("ttft_ms", variant.name, "stock"),
                    "decode_over_stock": rounds.ratio("tokens_per_s", variant.name, "stock"),
                }
                rows += [rounds.row(metric, found, **about) for metric, found in values.items()]
    return rows


def _timed(variant: Variant, prompts: Sequence[list[int]]) -> dict[str, float]:
    run = engines.decode(variant, prompts, NUM_TOKENS)
    ends = np.cumsum(run.all_ms)
    firsts = [steps[0] for steps in run.token_steps]
    # Only steps in which all requests decode: not those that still run a prompt, nor those after the first one ended.
    both = slice(max(firsts) + 1, min(steps[-1] for steps in run.token_steps) + 1)
    return {
        "ttft_ms": float(ends[firsts].mean()),
        "tokens_per_s": 1e3 * len(prompts) / float(np.median(run.all_ms[both])),
    }


def _draw(text: Sequence[int], rng: np.random.Generator, num: int, length: int) -> list[list[int]]:
    """Draw passages of `length` tokens."""
    if len(text) < length:
        raise Refused(f"the documentation has {len(text)} tokens of prose, fewer than a prompt of {length}")
    starts = rng.integers(0, len(text) - length + 1, num)
    return [list(text[start : start + length]) for start in starts]


if __name__ == "__main__":
    main()
