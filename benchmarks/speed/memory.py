"""Measures the memory of buddy beside stock vLLM: KV-cache capacity, and resident memory after serving requests.

    python -m benchmarks.speed.memory            # SmolLM2-135M, CPU, about 6 minutes

Each engine starts in its own process and serves eight requests. Capacity is that of a KV cache which vLLM sizes by
--gpu-memory-utilization, so that it gets what everything else leaves. Resident memory is that of the process with a KV
cache of a fixed size: with the other, vLLM would fill up whatever is not used.
"""

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, write_rows
from benchmarks.harness.rounds import add_rounds_option
from vllm_buddy.models.embedded import fetch

# How the KV cache gets its size, by what is measured.
KV_CACHES: dict[str, dict[str, Any]] = {
    "kv_capacity_tokens": {"gpu_memory_utilization": 0.3},
    "resident_mib": {"kv_cache_memory_bytes": 1 << 30},
}
PROMPTS = [list(range(100 + i, 400 + i)) for i in range(8)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_rounds_option(parser, 2)
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_memory.jsonl")
    parser.add_argument("--child", choices=["stock", "buddy"], help=argparse.SUPPRESS)
    parser.add_argument("--metric", choices=list(KV_CACHES), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.metric, args.model)))
        return
    env = environment()
    model = fetch(report=print)
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for metric, variant in product(KV_CACHES, ("stock", "buddy")):
            command = [sys.executable, "-m", "benchmarks.speed.memory", "--model", str(model)]
            command += ["--child", variant, "--metric", metric]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.setdefault((metric, variant), []).append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for metric in KV_CACHES:
        mean = {v: sum(found[metric, v]) / args.rounds for v in ("stock", "buddy")}
        rows += [{"metric": metric, "variant": v, "value": m, "n": args.rounds} for v, m in mean.items()]
        ratio = {"metric": f"{metric}_ratio", "variant": "buddy", "value": mean["buddy"] / mean["stock"]}
        rows.append({**ratio, "n": args.rounds})
    write_rows(args.out, rows, env)
    for row in rows:
        print(f"{row['variant']:6} {row['metric']:26} {row['value']:12.3f}")


def measure(variant: str, metric: str, model: str) -> float:
    """Start one engine in this process, serve the prompts and return its KV capacity or resident memory."""
    import psutil
    from vllm import LLM, SamplingParams

    from benchmarks.harness import engines

    options: dict[str, Any] = {"model_impl": "buddy"} if variant == "buddy" else {}
    llm = LLM(model, max_model_len=2048, **KV_CACHES[metric], **options)
    budgets = [1.0, 0.75, 0.5] if variant == "buddy" else [None]
    params = [
        SamplingParams(max_tokens=32, extra_args=None if b is None else {"buddy_budget": b})
        for b in (budgets[i % len(budgets)] for i in range(len(PROMPTS)))
    ]
    llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    config = engines.core(llm).vllm_config.cache_config
    if metric == "kv_capacity_tokens":
        return config.num_gpu_blocks * config.block_size
    return psutil.Process().memory_info().rss / 2**20


if __name__ == "__main__":
    main()
