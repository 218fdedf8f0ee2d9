"""Measures what KV units hold and cost, beside the dense layout and stock vLLM, on a KV cache of 110 MiB.

    python -m benchmarks.speed.kv_layouts            # SmolLM2-135M, CPU, about 19 minutes of one core

Three engines run side by side: stock vLLM, and buddy with either layout. Every variant is checked against the plain
forward of the method first. Each round has three engines of its own: two engines of the same layout run the same code
on weights that lie elsewhere in memory, and their steps may differ by 10% for as long as they run, in layers and head.
A set of engines takes about 2 GB.

- *Tokens that fit*: prompts of whole KV blocks are computed one by one, and the blocks that each of them takes counted.
- *Under pressure*: 32 requests, 384 tokens of prompt and 128 decoded ones each, arrive at once, more than fit.
- *Decode steps*: batches that fit in either layout.

Times are CPU times of the engine's thread, which other work on the machine disturbs less than the clock. vLLM computes
in this thread alone: of two, each would wait for the other. In large pages it matters less where weights lie.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import engines
from benchmarks.harness.engines import Variant
from benchmarks.harness.real_prompts import passages
from benchmarks.harness.reference_check import Reference
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Refused, Rounds, add_rounds_option, in_turn
from vllm_buddy.artifact import SHIPPED_DIR, load_artifact
from vllm_buddy.method import depth_for_budget, full_path
from vllm_buddy.models.embedded import DEFAULT_MODEL, fetch

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # read when a process starts
KV_MIB = 110
BUDGETS = (1.0, 0.75, 0.5)
LAYOUTS = ("dense", "units")
NUM_FILLED = 24  # prompts whose blocks are counted
BLOCKS_FILLED = 4  # of each
NUM_REQUESTS, PROMPT_TOKENS, DECODED_TOKENS = 32, 384, 128
BATCHES, BATCH_PROMPT_TOKENS, BATCH_TOKENS = (8, 32), 64, 33


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.kv_layouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_rounds_option(parser, 5)
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_kv_layouts.jsonl")
    args = parser.parse_args()
    if {**os.environ, **ENVIRONMENT} != os.environ:
        os.environ.update(ENVIRONMENT)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.speed.kv_layouts", *sys.argv[1:]])
    env = environment()
    model, artifact = fetch(report=print), load_artifact(SHIPPED_DIR / DEFAULT_MODEL)
    by_round = [start(model, artifact) for _ in range(args.rounds)]
    text, variants = Text(model), by_round[0]
    reference = Reference(model, artifact, variants[0].llm.llm_engine.model_config.dtype)
    prompts = text.prompts(8, BATCH_PROMPT_TOKENS)
    for variant in chain(*by_round):
        reference.check(variant, prompts, engines.second_token_logprobs(variant, prompts))
    rounds = Rounds(args.rounds)
    rounds.mark_checked([variant.name for variant in variants])
    rows = [*tokens_that_fit(variants, text), *under_pressure(by_round, text, rounds)]
    for batch in BATCHES:
        rounds = Rounds(args.rounds)
        rounds.mark_checked([variant.name for variant in variants])
        rows += decode_steps(by_round, text, batch, rounds)
    report(args.out, rows, env)
    return 0


def start(model: Path, artifact: Any) -> list[Variant]:
    """Start the three engines; returns their variants: stock, then both layouts at all budgets."""
    from vllm import LLM

    num_layers, router = artifact.config.base_model.num_layers, artifact.router()
    options: dict[str, Any] = {
        "max_model_len": 2048,
        "max_num_seqs": 64,
        "kv_cache_memory_bytes": KV_MIB << 20,
        "skip_tokenizer_init": True,
    }
    variants = [Variant(name="stock", layers=num_layers, path=full_path(num_layers), llm=LLM(str(model), **options))]
    for layout in LAYOUTS:
        llm = LLM(str(model), model_impl="buddy", additional_config={"buddy": {"kv_layout": layout}}, **options)
        schedule = engines.core(llm).scheduler._routes.schedule
        for budget in BUDGETS:
            variants.append(
                Variant(
                    name=f"{layout} {budget}",
                    layers=depth_for_budget(budget, num_layers),
                    llm=llm,
                    budget=budget,
                    router=router,
                    schedule=schedule,
                )
            )
    return variants


class Text:
    """Token ids of passages of prose, cut into prompts, each from another place."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer

        self._ids = AutoTokenizer.from_pretrained(model)("\n\n".join(passages()))["input_ids"]
        self._rng = np.random.default_rng(0)

    def prompts(self, num: int, num_tokens: int) -> list[list[int]]:
        """Prompts of num_tokens each."""
        starts = self._rng.choice(len(self._ids) - num_tokens, num, replace=False)
        return [self._ids[start : start + num_tokens] for start in starts.tolist()]


def tokens_that_fit(variants: Sequence[Variant], text: Text) -> list[dict[str, Any]]:
    """One row per variant and one for its ratio to stock: tokens of KV that the whole cache holds."""
    block_size = engines.core(variants[0].llm).vllm_config.cache_config.block_size
    prompts = text.prompts(NUM_FILLED, BLOCKS_FILLED * block_size)
    fit = {}
    for variant in variants:
        tokens_per_block = [_tokens_per_block(variant, prompt) for prompt in prompts]
        fit[variant.name] = _usable(variant) / float(np.mean([1 / n for n in tokens_per_block]))
    rows: list[dict[str, Any]] = []
    for variant in variants:
        about = {"variant": variant.name, "budget": variant.budget, "n": len(prompts)}
        tokens = fit[variant.name]
        rows.append({"metric": "kv_tokens", **about, "value": tokens})
        rows.append({"metric": "kv_tokens_over_stock", **about, "value": tokens / fit["stock"]})
    return rows


def _usable(variant: Variant) -> int:
    """KV blocks of a variant's engine; vLLM keeps one for itself."""
    return _block_pool(variant).num_gpu_blocks - 1


def _used(variant: Variant) -> int:
    """KV blocks that requests hold now."""
    return _usable(variant) - _block_pool(variant).get_num_free_blocks()


def _block_pool(variant: Variant) -> Any:
    return engines.core(variant.llm).scheduler.kv_cache_manager.block_pool


def _check_all_free(variant: Variant) -> None:
    if used := _used(variant):
        raise Refused(f"{variant.name}: {used} KV blocks are still in use when all is done")


def _tokens_per_block(variant: Variant, prompt: list[int]) -> float:
    """Compute a prompt, and count the blocks that it takes before it goes on."""
    engine = variant.llm.llm_engine
    variant.prepare()
    _add(variant, "filled", prompt, 2)
    engine.step()
    used = _used(variant)
    while engine.has_unfinished_requests():
        engine.step()
    _check_all_free(variant)
    return len(prompt) / used


def under_pressure(by_round: Sequence[Sequence[Variant]], text: Text, rounds: Rounds) -> list[dict[str, Any]]:
    """Serve more requests than fit: how many run together, preemptions, and tokens per CPU second beside stock."""
    for index, variants in enumerate(by_round):
        chosen = [variant for variant in variants if variant.budget in (None, 0.5)]
        prompts = text.prompts(NUM_REQUESTS, PROMPT_TOKENS)
        for variant in in_turn(chosen, index):
            rounds.add(index, variant.name, **_pressed(variant, prompts))
    rows = []
    for variant in chosen:
        about = {"variant": variant.name, "budget": variant.budget, "requests": NUM_REQUESTS}
        for metric in ("running_together", "preemptions", "tokens_per_cpu_s"):
            rows.append(rounds.row(metric, rounds.values(metric, variant.name), **about))
        rows.append(
            rounds.row("tokens_per_cpu_s_over_stock", rounds.ratio("tokens_per_cpu_s", variant.name, "stock"), **about)
        )
    units, dense = (f"{layout} 0.5" for layout in ("units", "dense"))
    ratio = rounds.ratio("tokens_per_cpu_s", units, dense)
    return [*rows, rounds.row("tokens_per_cpu_s_over_dense", ratio, variant=units, budget=0.5, requests=NUM_REQUESTS)]


def _pressed(variant: Variant, prompts: Sequence[list[int]]) -> dict[str, float]:
    engine, scheduler = variant.llm.llm_engine, engines.core(variant.llm).scheduler
    variant.prepare()
    most = 0
    preemptions: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        _add(variant, f"pressed-{index}", prompt, DECODED_TOKENS)
    started = time.thread_time()
    while engine.has_unfinished_requests():
        engine.step()
        most = max(most, len(scheduler.running))
        preemptions |= {name: request.num_preemptions for name, request in scheduler.requests.items()}
    seconds = time.thread_time() - started
    _check_all_free(variant)
    return {
        "running_together": most,
        "preemptions": sum(preemptions.values()),
        "tokens_per_cpu_s": len(prompts) * DECODED_TOKENS / seconds,
    }


def decode_steps(by_round: Sequence[Sequence[Variant]], text: Text, batch: int, rounds: Rounds) -> list[dict[str, Any]]:
    """Time decode steps of a batch that fits in every layout."""
    for index, variants in enumerate(by_round):
        for _ in range(2):  # the first warms up, and what it adds is replaced
            prompts = text.prompts(batch, BATCH_PROMPT_TOKENS)
            for variant in in_turn(variants, index):
                rounds.add(index, variant.name, cpu_ms_per_step=float(np.median(_decoded(variant, prompts))))
    rows = []
    for variant in by_round[0]:
        about = {"variant": variant.name, "budget": variant.budget, "batch": batch}
        rows.append(rounds.row("cpu_ms_per_step", rounds.values("cpu_ms_per_step", variant.name), **about))
        if variant.name.startswith("units"):
            dense = f"dense {variant.budget}"
            ratio = rounds.ratio("cpu_ms_per_step", variant.name, dense)
            rows.append(rounds.row("cpu_ms_per_step_over_dense", ratio, **about))
    return rows


def _decoded(variant: Variant, prompts: Sequence[list[int]]) -> list[float]:
    """CPU time of each decode step of a batch, in ms."""
    engine = variant.llm.llm_engine
    variant.prepare()
    for index, prompt in enumerate(prompts):
        _add(variant, f"decoded-{index}", prompt, BATCH_TOKENS)
    engine.step()  # the prompts
    cpu_ms = []
    while engine.has_unfinished_requests():
        started = time.thread_time()
        engine.step()
        cpu_ms.append((time.thread_time() - started) * 1e3)
    return cpu_ms[: BATCH_TOKENS - 1]


def _add(variant: Variant, name: str, prompt: list[int], num_tokens: int) -> None:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, extra_args=variant.extra_args
    )
    variant.llm.llm_engine.add_request(f"{name}-{time.monotonic_ns()}", {"prompt_token_ids": prompt}, params)


if __name__ == "__main__":
    sys.exit(main())
