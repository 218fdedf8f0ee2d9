"""Measures what direct calls of compiled layers gain over torch's wrappers, and what sharing their code gains at start.

    python -m benchmarks.speed.layer_calls            # SmolLM2-135M, CPU, about 3 minutes on 2 cores

The decode steps of one engine are timed in turn with the layers called directly (serving/forward/direct_call.py) and
through the compiled functions of torch; both must give the same tokens. The time to make the functions of all layers
is measured with code shared between layers that are alike, as in serving, and with every layer compiled alone.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.forward_context import create_forward_context, override_forward_context

from benchmarks.harness import engines
from benchmarks.harness.engines import Variant
from benchmarks.harness.lineup import add_lineup_options, open_lineup
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Refused, Rounds, add_rounds_option, in_turn, positive_int
from vllm_buddy.serving.forward import compiled

DIRECT, WRAPPED = "direct calls", "torch's wrappers"
SHARED, ALONE = "shared code", "each layer alone"
PROMPT_TOKENS = 64
NUM_TOKENS = 33


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.layer_calls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1, 8])
    add_rounds_option(parser, 6)
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_layer_calls.jsonl")
    add_lineup_options(parser)
    args = parser.parse_args()
    env = environment()
    rows = []
    with open_lineup(args) as lineup:
        variant = lineup.routed(1.0)
        backbone = engines.backbone(variant.llm)
        through_wrappers, alone = timed(wrapped, variant, ALONE)
        _, together = timed(shared, variant, SHARED)
        rows += [alone, together]
        functions = {DIRECT: backbone.functions, WRAPPED: through_wrappers}
        for batch in args.batch:
            rounds = Rounds(args.rounds)
            tokens: dict[str, Any] = {}
            rng = np.random.default_rng(batch)
            for index in range(-1, args.rounds):  # the first warms up
                prompts = lineup.draw_prompts(rng, batch, PROMPT_TOKENS)
                for name in in_turn(list(functions), index):
                    backbone.functions = functions[name]
                    run = engines.decode(variant, prompts, NUM_TOKENS)
                    tokens[name] = run.token_ids
                    if index >= 0:
                        rounds.add(index, name, ms_per_step=float(np.median(run.step_ms)))
                if tokens[DIRECT] != tokens[WRAPPED]:
                    raise Refused("direct calls and torch's wrappers give different tokens")
            rounds.mark_checked(functions)
            for name in functions:
                about = {"variant": name, "batch": batch}
                rows.append(rounds.row("ms_per_step", rounds.values("ms_per_step", name), **about))
                ratio = rounds.ratio("ms_per_step", WRAPPED, name)
                rows.append(rounds.row("speed_over_wrappers", ratio, **about))
        backbone.functions = functions[DIRECT]
    report(args.out, rows, env)
    return 0


def wrapped(variant: Variant) -> list[Any]:
    """The compiled layers of the engine, called as torch hands them out."""
    vllm_config = engines.core(variant.llm).vllm_config
    functions = []
    for index, layer in enumerate(engines.backbone(variant.llm).layers):
        rows = compiled._layer_inputs(vllm_config, compiled.most_tokens(vllm_config), with_residual=index > 0)
        with override_forward_context(create_forward_context(None, vllm_config)):
            functions.append(partial(compiled.compile_ahead(layer.forward, rows, vllm_config), layer))
    return functions


def shared(variant: Variant) -> list[Any]:
    """The layers of the engine compiled anew as serving does it."""
    return compiled.layer_functions(list(engines.backbone(variant.llm).layers), engines.core(variant.llm).vllm_config)


def timed(make: Callable[[Variant], list[Any]], variant: Variant, name: str) -> tuple[list[Any], dict[str, Any]]:
    """What `make` makes, and the row of how long it takes. The compiler's caches on disk are warm for both."""
    torch._dynamo.reset()
    started = time.perf_counter()
    with set_current_vllm_config(engines.core(variant.llm).vllm_config), torch.inference_mode():
        functions = make(variant)
    return functions, {"metric": "compile_s", "variant": name, "value": time.perf_counter() - started, "n": 1}


if __name__ == "__main__":
    sys.exit(main())
